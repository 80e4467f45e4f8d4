"""What a composed step consists of: stages in order, what each needs and provides, and what it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.experience import Experience, Prompts, TrainState
from jaxrl_llm.models.parameters import parameter_count
from jaxrl_llm.rollout.host_turns import host_turns_shapes
from jaxrl_llm.run.prompt_lengths import width_shares
from jaxrl_llm.run.setup import Parts, prompts_handed
from jaxrl_llm.training.checks import COLLECTED
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.conversations import prepared
from jaxrl_llm.training.critics import BEFORE
from jaxrl_llm.training.external_engine import with_staleness
from jaxrl_llm.training.phases import collect
from jaxrl_llm.training.placement import abstract_like
from jaxrl_llm.training.provide import FROM_DATA, FROM_REFERENCE, ON_DEMAND
from jaxrl_llm.training.stored import written_rows
from jaxrl_llm.training.trainable import trainable_part
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
            "name": _sampler(step),
            "needs": ["params", "prompts", "key", "step"],
            "provides": ", ".join(sorted(COLLECTED - {"weight", "mask", "source", "sample", "group"})),
            "where": "engine" if step.external else "host" if step.turns else "program",
        }
    ]
    rows += [
        entry("score", t.name, t.function, f"reward component x {t.weight:g}", "host" if t.on_host else "program")
        for t in step.rewards
    ]
    rows += [
        {"stage": "credit", "name": by, "needs": needs, "provides": name, "where": "program"}
        for name in sorted(step.wanted & ON_DEMAND)
        for by, needs in [_provider(step, name)]
    ]
    rows += [entry("credit", t.name, t.function, t.field) for t in step.credit]
    for term in step.losses:
        by = f"{term.coefficient:g}" if not term.coefficient_changes else "a coefficient that changes"
        rows.append(entry("learn", term.name, term.function, f"loss x {by}"))
    return rows


def _sampler(step: Composition) -> str:
    if step.external is not None:
        return step.external.engine.url
    if step.rollout.environment is None:
        return "generate"
    return "generate_turns" if step.turns is None else "host_generate_turns"


def _provider(step: Composition, name: str) -> tuple[str, list[str]]:
    """Who provides an on-demand field, and from what."""
    if name in BEFORE:
        return f"{BEFORE[name].critic} model forward pass", ["critics", "tokens"]
    if name in FROM_DATA:
        return "the data", ["prompts"]
    if name == "baseline_rewards":
        return "greedy completions", ["params", "prompts", "rewards"]
    if name in FROM_REFERENCE:
        return "reference forward pass", ["reference_params", "tokens"]
    own = {"old_logprobs": "behaviour_logprobs", "old_entropy": "behaviour_entropy"}
    if name in own and step.keeps_record and step.external is None:
        return "the sampler's own", [own[name]]
    return "policy forward pass", ["params", "tokens"]


def abstract_inputs(parts: Parts) -> tuple[TrainState, Prompts | Experience, Experience | None]:
    """State, prompts (or rows, where an engine samples) and stored rows of a step's programs as shapes.

    No memory is used.
    """
    config, c = parts.config, parts.step.composition
    rows, rollout = prompts_handed(config), config.rollout
    with_demonstrations = c.wanted & FROM_DATA

    def prompts() -> Prompts:
        number = jnp.zeros(rows, jnp.int32)
        completion = jnp.zeros((rows, rollout.max_completion_tokens), jnp.int32)
        return Prompts(
            tokens=jnp.zeros((rows, rollout.max_prompt_tokens), jnp.int32),
            length=number,
            prompt_id=number,
            answer_tokens=completion,
            answer_length=number,
            demonstration_tokens=completion if with_demonstrations else None,
            demonstration_length=number if with_demonstrations else None,
        )

    def stored() -> Experience | None:
        if c.stored is None:
            return None
        width = rollout.max_completion_tokens
        count = c.stored.groups * rollout.samples_per_prompt
        return written_rows(
            jnp.zeros((count, rollout.max_prompt_tokens), jnp.int32),
            jnp.ones(count, jnp.int32),
            jnp.zeros(count, jnp.int32),
            jnp.zeros((count, width), jnp.int32),
            jnp.ones(count, jnp.int32),
            answer_width=width,
            **{name: jnp.zeros((count, width) if name == "stored_logprobs" else count) for name in c.stored.provides},
        )

    def sampled(state: TrainState, prompts: Prompts) -> Experience:
        return with_staleness(collect(c, state, prompts), 0)

    given, placed = jax.eval_shape(prompts), c.placed
    state = jax.eval_shape(parts.step.init, jax.random.key(0))
    if parts.step.prime is not None:
        state = jax.eval_shape(parts.step.prime, state, given)
    state = state if placed is None else abstract_like(state, placed)
    if c.rollout.environment is not None:
        prepared(c.rollout.environment, given, parts.model.vocabulary_size)
    if c.turns is not None:
        talks = host_turns_shapes(c.turns, state.params, given, state.key, state.step)
        return state, talks, jax.eval_shape(stored)
    return state, given if c.external is None else jax.eval_shape(sampled, state, given), jax.eval_shape(stored)


def trace(parts: Parts) -> Experience:
    """The experience of one step as shapes. Sizes and hyper-parameters that cannot work are found here, at no cost.

    Raises:
      ValueError: from whatever part of the step refuses its input.
    """
    state, prompts, stored = abstract_inputs(parts)
    first, *rest = parts.step.programs
    if not rest:
        return jax.eval_shape(first, state, prompts, stored)[-1]
    return jax.eval_shape(rest[0], state, jax.eval_shape(first, state, prompts), stored)[-1]


def explanation(parts: Parts) -> dict[str, Any]:
    """The composed step of a config as plain data; compiles the step's programs to count their work.

    Returns:
      stages: see `stages`. shapes: name -> dtype[shape] of the experience that one step fills in.
      sizes: parameters, sequences, tokens, updates. widths: see `width_shares`. programs: for each compiled program of
      the widest prompts FLOPs, bytes accessed and temporary memory, as XLA's cost model counts them (a loop body counts
      once, however often it runs).
    """
    config, step = parts.config, parts.step
    programs = programs_with_inputs(parts)
    state = programs[0].inputs[0]
    rows = config.training.prompts_per_step * config.rollout.samples_per_prompt
    return {
        "stages": stages(step.composition),
        "shapes": _shapes(trace(parts)),
        "sizes": {
            "parameters": parameter_count(parts.model.specs),
            "trainable_parameters": parameter_count(trainable_part(parts.model, parts.model.specs)),
            "prompts_per_step": config.training.prompts_per_step,
            "sequences_per_step": rows,
            "completion_tokens_per_step_at_most": rows * config.rollout.max_completion_tokens,
            "prompt_tokens_per_step_at_most": rows * config.rollout.max_prompt_tokens,
            "updates_per_step": config.training.epochs_per_batch * config.training.minibatches_per_epoch,
            "state_bytes": sum(_bytes(leaf) for leaf in jax.tree.leaves(state)),
        },
        "widths": width_shares(parts),
        "programs": [_cost(name, program.lower(*given).compile()) for name, program, given in programs],
    }


class Program(NamedTuple):
    """One compiled program of a step, and what it is called with, as shapes."""

    name: str
    program: Any
    inputs: tuple[Any, ...]


def programs_with_inputs(parts: Parts) -> list[Program]:
    """The programs of a step in order; the state is the first input of each."""
    step = parts.step
    state, prompts, stored = abstract_inputs(parts)
    if len(step.programs) == 1:
        return [Program("whole step", step.programs[0], (state, prompts, stored))]
    first = "collect" if step.composition.external is None else "policy view and score"
    if step.composition.turns is not None:
        first = "score"
    rows = jax.eval_shape(step.programs[0], state, prompts)
    return [
        Program(first, step.programs[0], (state, prompts)),
        Program("credit and learn", step.programs[1], (state, rows, stored)),
    ]


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
