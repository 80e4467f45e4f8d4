"""What a composed step consists of: stages in order, what each needs and provides, and what it costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.experience import Experience, Prompts, TrainState
from jaxrl_llm.models.parameters import parameter_count
from jaxrl_llm.training.checks import COLLECTED, ON_DEMAND
from jaxrl_llm.training.setup import Parts
from jaxrl_llm.training.step import Composition, TrainStep
from jaxrl_llm.training.wiring import fields_of, signature


def stages(step: Composition) -> list[dict[str, Any]]:
    """One entry a function, in the order in which a step runs them: stage, name, needs, provides, where."""

    def entry(stage: str, name: str, function: Any, provides: str, where: str = "program") -> dict[str, Any]:
        read = signature(function)
        needs = [*read.required, *(f"[{n}]" for n in read.optional)]
        return {"stage": stage, "name": name, "needs": needs, "provides": provides, "where": where}

    rows = [
        {
            "stage": "collect",
            "name": "generate",
            "needs": ["params", "prompts", "key", "step"],
            "provides": ", ".join(sorted(COLLECTED - {"weight", "mask", "source", "sample", "group"})),
            "where": "program",
        }
    ]
    rows += [
        entry("score", t.name, t.function, f"reward component x {t.weight:g}", "host" if t.on_host else "program")
        for t in step.rewards
    ]
    made = {
        "reference_logprobs": ("reference forward pass", ["reference_params", "tokens"]),
        "old_logprobs": ("the sampler's own", ["behaviour_logprobs"]),
        "old_entropy": ("the sampler's own", ["behaviour_entropy"]),
    }
    rows += [
        {"stage": "credit", "name": made[n][0], "needs": made[n][1], "provides": n, "where": "program"}
        for n in sorted(step.wanted & ON_DEMAND)
    ]
    rows += [entry("credit", t.name, t.function, t.field) for t in step.credit]
    for term in step.losses:
        by = f"{term.coefficient:g}" if not term.coefficient_changes else "a coefficient that changes"
        rows.append(entry("learn", term.name, term.function, f"loss x {by}"))
    return rows


def abstract_inputs(parts: Parts) -> tuple[TrainState, Prompts]:
    """State and prompts of one step as shapes: no memory is used."""
    config = parts.config
    rows = config.training.prompts_per_step

    def prompts() -> Prompts:
        number = jnp.zeros(rows, jnp.int32)
        return Prompts(
            tokens=jnp.zeros((rows, config.rollout.max_prompt_tokens), jnp.int32),
            length=number,
            prompt_id=number,
            answer_tokens=jnp.zeros((rows, config.rollout.max_completion_tokens), jnp.int32),
            answer_length=number,
        )

    return jax.eval_shape(parts.step.init, jax.random.key(0)), jax.eval_shape(prompts)


def trace(parts: Parts) -> Experience:
    """The experience of one step as shapes. Sizes and hyper-parameters that cannot work are found here, at no cost.

    Raises:
      ValueError: from whatever part of the step refuses its input.
    """
    state, prompts = abstract_inputs(parts)
    made = jax.eval_shape(parts.step.programs[0], state, prompts)
    for program in parts.step.programs[1:]:
        made = jax.eval_shape(program, state, made)
    return made[-1]


def explanation(parts: Parts) -> dict[str, Any]:
    """The composed step of a config as plain data; compiles the step's programs to count their work.

    Returns:
      stages: see `stages`. shapes: name -> dtype[shape] of the experience that one step fills in.
      sizes: parameters, sequences, tokens, updates. programs: for each compiled program FLOPs, bytes accessed and
      temporary memory, as XLA's cost model counts them (a loop body counts once, however often it runs).
    """
    config, step = parts.config, parts.step
    state, prompts = abstract_inputs(parts)
    inputs: list[tuple[TrainState, Any]] = [(state, prompts)]
    if len(step.programs) > 1:
        inputs.append((state, jax.eval_shape(step.programs[0], state, prompts)))
    rows = config.training.prompts_per_step * config.rollout.samples_per_prompt
    return {
        "stages": stages(step.composition),
        "shapes": _shapes(trace(parts)),
        "sizes": {
            "parameters": parameter_count(parts.model.specs),
            "prompts_per_step": config.training.prompts_per_step,
            "sequences_per_step": rows,
            "completion_tokens_per_step_at_most": rows * config.rollout.max_completion_tokens,
            "prompt_tokens_per_step_at_most": rows * config.rollout.max_prompt_tokens,
            "updates_per_step": config.training.epochs_per_batch * config.training.minibatches_per_epoch,
            "state_bytes": sum(_bytes(leaf) for leaf in jax.tree.leaves(state)),
        },
        "programs": [
            _cost(name, program.lower(*given).compile())
            for name, program, given in zip(_program_names(step), step.programs, inputs, strict=True)
        ],
    }


def _program_names(step: TrainStep) -> list[str]:
    return ["whole step"] if len(step.programs) == 1 else ["collect", "credit and learn"]


def _shapes(experience: Experience) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in fields_of(experience).items()}


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize


def _cost(name: str, compiled: Any) -> dict[str, Any]:
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    memory = compiled.memory_analysis()
    return {
        "program": name,
        "flops": float(cost.get("flops", float("nan"))),
        "bytes_accessed": float(cost.get("bytes accessed", float("nan"))),
        "temporary_bytes": int(memory.temp_size_in_bytes) if memory is not None else None,
        "argument_bytes": int(memory.argument_size_in_bytes) if memory is not None else None,
    }
