"""When a stage ends before its last step: its metric has not become better for a number of readings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxrl_llm.config import Config, ConfigError, StopWhenConfig
from jaxrl_llm.evaluation import COUNTED
from jaxrl_llm.fields import nearest

VALIDATION, KEPT = "validation/", "early_stopping"


def reading(held: Mapping[str, Any], rule: StopWhenConfig, step: int, value: float) -> dict[str, Any]:
    """What is known after one more reading of the metric.

    Args:
      held: what was known before; {} at the start of a stage.
      rule: when to stop.
      step: of the reading.
      value: the metric. One that is not a number is no better than any other.

    Returns:
      best and best_step; readings (without a better one); decided (the step whose reading exhausted the patience), once
      there is one. It is plain data, which a checkpoint keeps.

    >>> rule, held = StopWhenConfig("reward", patience=2), {}
    >>> for step, value in enumerate([0.5, 0.7, 0.7, 0.6], 1):
    ...     held = reading(held, rule, step, value)
    >>> held
    {'best': 0.7, 'best_step': 2, 'readings': 2, 'decided': 4}
    """
    if "decided" in held:
        return dict(held)
    gain = (value - held["best"]) * (1 if rule.best_is == "highest" else -1) if held else 0.0
    if (not held and value == value) or gain > rule.min_delta:
        return {"best": value, "best_step": step, "readings": 0}
    if not held:
        return {}
    without = held["readings"] + 1
    return dict(held) | {"readings": without} | ({"decided": step} if without >= rule.patience else {})


def note(meta: dict[str, Any], stage: str, rule: StopWhenConfig | None, step: int, shown: Mapping[str, float]) -> str:
    """Write what a step has shown into what checkpoints keep of the stages; a sentence where it decides that one ends.

    Args:
      meta: of the run; `early_stopping` holds for each stage what `reading` says.
      stage, rule: the stage, and when it ends.
      step: of the stage.
      shown: its metrics.
    """
    if rule is None or rule.metric not in shown:
        return ""
    before = meta.setdefault(KEPT, {}).get(stage, {})
    after = meta[KEPT][stage] = reading(before, rule, step, shown[rule.metric])
    if "decided" in before or "decided" not in after:
        return ""
    return (
        f"the {stage} ends with the next step: {rule.metric} has had no better reading than {after['best']:.4g}, at "
        f"step {after['best_step']}, for {after['readings']} readings"
    )


def over(meta: Mapping[str, Any], stage: str, done: int) -> bool:
    """Whether a stage ends after so many steps: with the step after the one that decided it."""
    return done > meta.get(KEPT, {}).get(stage, {}).get("decided", done)


def require_metric(stage: str, config: Config, known: Iterable[str]) -> None:
    """Raises ConfigError where training.stop_when reads what the steps of a stage, `known`, do not report."""
    rule = config.training.stop_when
    if rule is None:
        return
    if not rule.metric.startswith(VALIDATION):
        if rule.metric not in known:
            raise ConfigError(f"training.stop_when.metric is {rule.metric!r}; {nearest(rule.metric, known)}")
    elif not config.evaluation.every_steps:
        raise ConfigError(
            f"training.stop_when.metric is {rule.metric!r}, but nothing is evaluated while the {stage} trains; set "
            "evaluation.every_steps"
        )
    elif not config.environment:
        k = config.evaluation.k
        names = [VALIDATION + name for name in ("greedy", *(f"pass@{n}" for n in k), *(f"maj@{n}" for n in k if n > 1))]
        if rule.metric not in (*names, *(VALIDATION + name for name in COUNTED)):
            raise ConfigError(f"training.stop_when.metric is {rule.metric!r}; {nearest(rule.metric, names)}")
