"""A training step whose completions come from an engine in another process.

    hand over weights -> collect (engine) -> policy view and score -> host rewards -> credit, learn

The engine's log-probabilities are the behaviour policy's. Those of the policy that the update starts from, and its
entropy, are computed here, so that the difference is seen and can be corrected (`importance_weight`, recipe `tis`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxrl_llm.config import EngineConfig
from jaxrl_llm.experience import Experience, KeyUse, Prompts, TrainState
from jaxrl_llm.models.export import save_model
from jaxrl_llm.models.families import config_to_json
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.rollout.engine_http import Engine, EngineError, answer
from jaxrl_llm.rollout.external import engine_generate, probe
from jaxrl_llm.training import provide
from jaxrl_llm.training.wiring import filled

if TYPE_CHECKING:
    from jaxrl_llm.training.composition import Composition, Rollout

# Steps between the policy that sampled a row and the one that learns from it, in `Experience.extras`.
STALENESS = "staleness"


@dataclass(frozen=True)
class External:
    """An engine that samples for a training step.

    Attributes:
      engine: where it is and how it is asked.
      hand_over: (params, step) -> None gives it weights; None leaves it with those it was launched with.
      every_steps: steps from one hand-over to the next.
      probe_prompts: prompts of the first batch that the engine is checked with.
      probe_bound, probe_largest_bound: see `rollout.external.probe`.
    """

    engine: Engine
    hand_over: Callable[[PyTree, int], None] | None = None
    every_steps: int = 1
    probe_prompts: int = 8
    probe_bound: float = 0.05
    probe_largest_bound: float = 1.0


def check_external(rollout: Rollout, wanted: frozenset[str]) -> None:
    """Refuse what an engine does not do.

    Raises:
      ValueError: naming the option that asks for it.
    """
    asked = {
        "rollout.replay_router": rollout.replay_router,
        "rollout.prefixes": bool(rollout.prefixes),
        "rollout.extra": rollout.extra is not None,
        "rollout.demonstration_in_group": rollout.demonstration_in_group,
        "a method that names 'baseline_rewards' (a greedy completion of each prompt)": "baseline_rewards" in wanted,
    }
    if given := [name for name, value in asked.items() if value]:
        raise ValueError(
            f"rollout.engine is set together with {given[0]}, for which only the built-in sampler records what "
            "training needs; leave one of them out"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"rollout.engine is set in a run of {jax.process_count()} processes, which would all ask for the same "
            "completions; run the trainer in one process, or leave rollout.engine out"
        )


def with_staleness(rows: Experience, steps: int) -> Experience:
    """Rows that were sampled by the policy of so many steps ago."""
    return filled(rows, **{STALENESS: np.full(rows.tokens.shape[0], steps, np.float32)})


def with_policy_view(c: Composition, state: TrainState, rows: Experience) -> Experience:
    """Log-probabilities and entropies of our policy; the entropies stand in for the engine's, which are not known."""
    wanted = ("old_logprobs", "old_entropy")
    rows = provide.policy_view(
        c.model, state.params, rows, wanted, temperature=c.rollout.temperature, own_samples=False
    )
    return replace(rows, behaviour_entropy=jnp.asarray(rows.old_entropy))


def engine_metrics(rows: Experience) -> dict[str, Array]:
    """How far the engine is from the policy: |old - behaviour| log-probabilities over trained tokens, and in steps."""
    counted = rows.mask > 0
    gap = jnp.where(counted, jnp.abs(jnp.asarray(rows.old_logprobs) - rows.behaviour_logprobs), 0.0)
    return {
        "engine_gap_max": gap.max(),
        "engine_gap_mean": gap.sum() / jnp.maximum(counted.sum(), 1),
        "staleness_steps": rows.extras[STALENESS].mean(),
    }


def make_collect(c: Composition, external: External) -> Callable[[TrainState, Prompts], Experience]:
    """(state, prompts) -> rows on the host: weights handed over where that is due, and the engine probed once."""
    handed: list[int] = []  # the step whose policy the engine holds

    def collect(state: TrainState, prompts: Prompts) -> Experience:
        step, first = int(state.step), not handed
        due = first or step % external.every_steps == 0 or step < handed[-1]
        if external.hand_over is not None and due:
            external.hand_over(state.params, step)
        if first or (external.hand_over is not None and due):
            handed[:] = [step if external.hand_over is not None else 0]
        sizes: dict[str, Any] = {
            "max_completion_tokens": c.rollout.max_completion_tokens,
            "eos_ids": c.rollout.eos_ids,
            "pad_id": c.rollout.pad_id,
            "temperature": c.rollout.temperature,
            "step": step,
        }
        key = jax.random.fold_in(state.key, KeyUse.ROLLOUT)
        if first:
            few = jax.tree.map(lambda x: x[: external.probe_prompts], prompts)
            bounds: dict[str, Any] = {"bound": external.probe_bound, "largest_bound": external.probe_largest_bound}
            try:
                probe(external.engine, c.model, state.params, few, key, **sizes, **bounds)
            except EngineError:
                handed.clear()  # it is asked again when the step is tried again
                raise
        rows = engine_generate(
            external.engine,
            prompts,
            key,
            samples_per_prompt=c.rollout.samples_per_prompt,
            vocabulary_size=c.model.vocabulary_size,
            **sizes,
        )
        return with_staleness(rows, step - handed[-1])

    return collect


def disk_hand_over(
    engine: Engine,
    model: Model,
    directory: str | Path,
    *,
    path: str,
    body: Mapping[str, Any],
    then: tuple[str, ...] = (),
    source: str | Path | None = None,
) -> Callable[[PyTree, int], None]:
    """(params, step) -> None: export to `directory/policy-STEP`, tell the engine, delete what was exported before.

    Each step has a directory of its own: engines are known to keep files of a name that they have read.

    Args:
      engine: who is told.
      model: whose parameters they are; adapters are merged.
      directory: both see it under this path.
      path: what is called with `body` as JSON, in which "{directory}" stands for the exported directory.
      then: called after it, with an empty body.
      source: the checkpoint that the policy was made from, for config.json and tokenizer files.

    Raises:
      ValueError: when no family of models that engines know can express this one.
    """
    if not isinstance(model.config, TransformerConfig):
        raise ValueError(
            "rollout.engine.weights_directory is set, but a model of one's own cannot be exported; hand its weights "
            "over by External(hand_over=...)"
        )
    if source is None:
        config_to_json(model.config)  # raises for what cannot be said
    root = Path(directory).expanduser().resolve()

    def hand_over(params: PyTree, step: int) -> None:
        target = root / f"policy-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        save_model(
            target, params if model.trained is None else model.trained.merged(params), model.config, source=source
        )
        for called, content in ((path, _placed(body, str(target))), *((another, {}) for another in then)):
            said = answer(engine, called, content, what=f"the weights of step {step}")
            if isinstance(said, Mapping) and said.get("success") is False:
                raise EngineError(
                    f"{engine.address(called)} could not take {target}: {str(said.get('message'))[:300]!r}; the engine "
                    "must see rollout.engine.weights_directory under the same path and serve the same architecture"
                )
        for older in root.iterdir():
            if older != target and re.fullmatch(r"policy-\d{8}", older.name):
                shutil.rmtree(older, ignore_errors=True)

    return hand_over


def _placed(body: Any, directory: str) -> Any:
    """The body with the directory in the place of its name."""
    if isinstance(body, Mapping):
        return {key: _placed(value, directory) for key, value in body.items()}
    if isinstance(body, list | tuple):
        return [_placed(value, directory) for value in body]
    return body.replace("{directory}", directory) if isinstance(body, str) else body


def external_engine(config: EngineConfig | None, model: Model, source: Path | None) -> External | None:
    """The engine that a config describes; None without one."""
    if config is None:
        return None
    engine = Engine(
        config.url,
        config.model,
        timeout_s=config.timeout_s,
        concurrency=config.concurrency,
        retries=config.retries,
        api_key_variable=config.api_key_variable,
        request=config.request,
    )
    hand_over = None
    if config.weights_directory is not None and config.reload_path is not None:
        hand_over = disk_hand_over(
            engine,
            model,
            config.weights_directory,
            path=config.reload_path,
            body=config.reload_body,
            then=config.reload_then,
            source=source,
        )
    return External(
        engine,
        hand_over,
        max(config.reload_every_steps, 1),
        config.probe_prompts,
        config.probe_bound,
        config.probe_largest_bound,
    )
