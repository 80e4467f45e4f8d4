"""Export of weights to an external engine, and rows sampled by it.

The engine's log-probabilities are those of the behaviour policy. The trainer computes log-probabilities and entropy of
the policy before the update, so that the difference is logged and can be corrected (`importance_weight`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.endpoints import Endpoint, EndpointError, answer
from jaxrl_llm.experience import Experience, KeyUse, Prompts, TrainState
from jaxrl_llm.models.export import save_model
from jaxrl_llm.models.families import config_to_json
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.rollout.external import engine_generate, probe


@dataclass(frozen=True)
class External:
    """An external engine that samples for a training step.

    Attributes:
      engine: address and request settings.
      hand_over: (params, step) -> None loads the weights into the engine; None: the engine keeps its initial weights.
      every_steps: steps between two calls of `hand_over`.
      probe_prompts: number of prompts of the first batch for the probe.
      probe_bound, probe_largest_bound: see `rollout.external.probe`.
      handed: the step of the weights in the engine; empty before the first batch.
    """

    engine: Endpoint
    hand_over: Callable[[PyTree, int], None] | None = None
    every_steps: int = 1
    probe_prompts: int = 8
    probe_bound: float = 0.05
    probe_largest_bound: float = 1.0
    handed: list[int] = field(default_factory=list, compare=False)


def engine_rows(
    external: External,
    model: Model,
    state: TrainState,
    prompts: Prompts,
    *,
    samples_per_prompt: int,
    first_sample: Any = 0,
    **sizes: Any,
) -> Experience:
    """Rows on the host; loads new weights into the engine when due, and probes the engine once.

    Args:
      external: the engine.
      model, state: the policy and its parameters.
      prompts: the prompts to complete.
      samples_per_prompt, first_sample: number of rows per prompt, and the number of the first sample.
      sizes: max_completion_tokens, eos_ids, pad_id, temperature.

    Returns:
      Rows with `staleness`.
    """
    handed, step = external.handed, int(state.step)
    first = not handed
    due = first or step % external.every_steps == 0 or step < handed[-1]
    if external.hand_over is not None and due and (first or handed[-1] != step):
        external.hand_over(state.params, step)
    if first or (external.hand_over is not None and due):
        handed[:] = [step if external.hand_over is not None else 0]
    sizes = {**sizes, "step": step}
    key = jax.random.fold_in(state.key, KeyUse.ROLLOUT)
    if first:
        few = jax.tree.map(lambda x: x[: external.probe_prompts], prompts)
        bounds: dict[str, Any] = {"bound": external.probe_bound, "largest_bound": external.probe_largest_bound}
        try:
            probe(external.engine, model, state.params, few, key, **sizes, **bounds)
        except EndpointError:
            handed.clear()  # weights are loaded again if the step is retried
            raise
    rows = engine_generate(
        external.engine,
        prompts,
        key,
        samples_per_prompt=samples_per_prompt,
        first_sample=first_sample,
        vocabulary_size=model.vocabulary_size,
        **sizes,
    )
    staleness: Any = np.full(rows.tokens.shape[0], step - handed[-1], np.float32)
    return rows.filled(staleness=staleness)


def disk_hand_over(
    engine: Endpoint,
    model: Model,
    directory: str | Path,
    *,
    path: str,
    body: Mapping[str, Any],
    then: tuple[str, ...] = (),
    source: str | Path | None = None,
) -> Callable[[PyTree, int], None]:
    """(params, step) -> None: export to `directory/policy-STEP`, call the engine, delete earlier exports.

    Each step has a separate directory, because some engines cache files by name.

    Args:
      engine: the engine to call.
      model: the policy; adapters are merged.
      directory: readable by both processes under this path.
      path: URL path called with `body` as JSON, in which "{directory}" is replaced by the exported directory.
      then: URL paths called afterwards, with an empty body.
      source: the original checkpoint, for config.json and tokenizer files.

    Raises:
      ValueError: if the model cannot be exported as a known family.
    """
    if not isinstance(model.config, TransformerConfig):
        raise ValueError(
            "rollout.engine.weights_directory is set, but a custom model cannot be exported; load its weights "
            "over by External(hand_over=...)"
        )
    if source is None:
        config_to_json(model.config)  # raises for a model that cannot be exported
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
                raise EndpointError(
                    f"{engine.address(called)} could not take {target}: {str(said.get('message'))[:300]!r}; the engine "
                    "must see rollout.engine.weights_directory under the same path and serve the same architecture"
                )
        for older in root.iterdir():
            if older != target and re.fullmatch(r"policy-\d{8}", older.name):
                shutil.rmtree(older, ignore_errors=True)

    return hand_over


def _placed(body: Any, directory: str) -> Any:
    """The body with {directory} replaced."""
    if isinstance(body, Mapping):
        return {key: _placed(value, directory) for key, value in body.items()}
    if isinstance(body, list | tuple):
        return [_placed(value, directory) for value in body]
    return body.replace("{directory}", directory) if isinstance(body, str) else body
