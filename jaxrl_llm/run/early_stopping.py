"""Early stopping: a stage ends if its metric has not improved for a number of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxrl_llm.bounds import counted
from jaxrl_llm.config import Config, ConfigError, StopWhenConfig
from jaxrl_llm.evaluation import COUNTED
from jaxrl_llm.fields import nearest
from jaxrl_llm.run.step_names import step_name

VALIDATION, KEPT = "validation/", "early_stopping"


def reading(held: Mapping[str, Any], rule: StopWhenConfig, step: int, value: float) -> dict[str, Any]:
    """The state of early stopping after one more value of the metric.

    Args:
      held: the state before; {} at the start of a stage.
      rule: when to stop.
      step: of the value.
      value: the metric; NaN never counts as an improvement.

    Returns:
      best and best_step; readings (number of values without improvement); decided (the step that exhausted the
      patience), once there is one. It is plain data, stored in checkpoints.

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
    """Update the early stopping of a stage in the metadata of checkpoints; returns a message if the stage will end.

    Args:
      meta: of the run; `early_stopping` holds the result of `reading` for each stage.
      stage, rule: the stage, and its rule.
      step: of the stage.
      shown: metrics of the step.
    """
    if rule is None or rule.metric not in shown:
        return ""
    before = meta.setdefault(KEPT, {}).get(stage, {})
    after = meta[KEPT][stage] = reading(before, rule, step, shown[rule.metric])
    if "decided" in before or "decided" not in after:
        return ""
    best = step_name(after["best_step"], stage, meta.get("steps_before", 0))
    return (
        f"the {stage} ends with the next step: {rule.metric} has not improved on {after['best']:.4g}, at {best}, for "
        f"{counted(after['readings'], 'value')}"
    )


def over(meta: Mapping[str, Any], stage: str, done: int) -> bool:
    """Whether a stage ends after this step: one step after the deciding one."""
    return done > meta.get(KEPT, {}).get(stage, {}).get("decided", done)


def require_metric(key: str, metric: str, stage: str, config: Config, known: Iterable[str] | None = None) -> None:
    """Raise ConfigError for a metric that a stage does not measure.

    Args:
      key: of the config that names the metric.
      metric: its value.
      stage: name of the stage.
      config: of the stage.
      known: metrics of its steps; None where only metrics of evaluations on the validation split are meant.
    """
    k = config.evaluation.k
    names = [VALIDATION + name for name in ("greedy", *(f"pass@{n}" for n in k), *(f"maj@{n}" for n in k if n > 1))]
    if not metric.startswith(VALIDATION):
        if known is None or metric not in known:
            raise ConfigError(f"{key} is {metric!r}; {nearest(metric, names if known is None else known)}")
    elif not config.evaluation.every_steps:
        raise ConfigError(
            f"{key} is {metric!r}, but the {stage} has no evaluations during training; set evaluation.every_steps"
        )
    elif not config.environment and metric not in (*names, *(VALIDATION + name for name in COUNTED)):
        raise ConfigError(f"{key} is {metric!r}; {nearest(metric, names)}")
