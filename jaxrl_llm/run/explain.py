"""Describes a composed step: its stages in order, their inputs and outputs, and its cost."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.evaluation.evaluate import decoding_program
from jaxrl_llm.experience import FACTS, Experience, Method, Prompts, TrainState
from jaxrl_llm.fields import kind_of, provided_by
from jaxrl_llm.models.parameters import parameter_count
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.rows import written_rows
from jaxrl_llm.run.batches import prompt_columns, prompts_handed
from jaxrl_llm.run.evaluation_batch import evaluation_batch
from jaxrl_llm.run.prompt_lengths import width_shares
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.signatures import signature
from jaxrl_llm.terms import View
from jaxrl_llm.training.collect import prepared
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.networks import POLICY, given_shapes, trainable_part
from jaxrl_llm.training.segments import Work, abstract_like, shapes
from jaxrl_llm.training.step import given_work


def stages(step: Composition) -> list[dict[str, Any]]:
    """One entry per function, in the order of a step: stage, name, needs, provides, where."""

    def entry(stage: str, name: str, function: Any, provides: str, where: str = "program") -> dict[str, Any]:
        read = signature(function)
        needs = [*read.required, *(f"[{n}]" for n in read.optional)]
        return {"stage": stage, "name": name, "needs": needs, "provides": provides, "where": where}

    facts = set(FACTS) - {"weight", "mask", "source", "sample", "group", "router_choices", "support"}
    where = "program"
    if step.rollout is not None:
        host = isinstance(step.rollout.environment, HostEnvironment)
        where = "engine" if step.rollout.engine else "host" if host else "program"
    rows = [
        {
            "stage": "collect",
            "name": _source(step),
            "needs": ["params", "prompts", "key", "step"] if step.rollout else ["the data"],
            "provides": ", ".join(sorted(facts)),
            "where": where,
        }
    ]
    rows += [
        entry("rewards", t.name, t.function, f"reward component x {t.weight:g}", "host" if t.on_host else "program")
        for t in step.rewards
    ]
    asked = {step.view_of(name) for name in (*step.wanted, *step.named)} - {""}
    rows += [
        entry("views", view.name, view.function, _of_view(view), "host" if view.on_host else "program")
        for view in step.views.values()
        if view.name in asked
    ]
    rows += [
        {"stage": "networks", "name": by, "needs": needs, "provides": name, "where": "program"}
        for name in sorted(step.wanted)
        for by, needs in [_provider(step, name)]
    ]
    for term in step.credit:
        rows.append(
            entry("credit", term.name, term.function, ", ".join(term.names), "host" if term.on_host else "program")
        )
    for term in step.losses:
        by = f"{term.coefficient:g}" if not term.coefficient_changes else "a coefficient that changes"
        rows.append(entry("learn", term.name, term.function, f"loss x {by}"))
    return rows


def hyper_parameters(step: Composition) -> list[dict[str, Any]]:
    """The keywords of all functions of a step: function, keyword, value, and its origin.

    "given": set in the recipe or filled from the run; "default": from the function's signature.
    """
    terms = [(t.name, t.function) for t in (*step.views.values(), *step.rewards, *step.credit, *step.losses)]
    terms += [(f"coefficient of {t.name}", t.coefficient) for t in step.losses if t.coefficient_changes]
    rows = []
    for name, function in terms:
        given: dict[str, Any] = {}
        while isinstance(function, partial):
            given, function = function.keywords | given, function.func
        target = function.update if isinstance(function, Method) else function
        for keyword, parameter in inspect.signature(target).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY:
                continue
            value = given.get(keyword, parameter.default)
            source = "given" if keyword in given else "default"
            rows.append({"function": name, "keyword": keyword, "value": str(value), "from": source})
    return rows


def _of_view(view: View) -> str:
    return f"{view.name}_text, by {' and '.join(view.writers)}" if view.writers else f"{view.name}_tokens"


def _source(step: Composition) -> str:
    r = step.rollout
    if r is None:
        return "written rows"
    if r.engine is not None:
        return r.engine.engine.url
    if r.environment is None:
        return "generate"
    return "host_generate_turns" if isinstance(r.environment, HostEnvironment) else "generate_turns"


def _provider(step: Composition, name: str) -> tuple[str, list[str]]:
    """The provider of a name that is computed on demand, and its inputs."""
    if name in provided_by("data"):
        return "the data", ["prompts"]
    if name == "baseline_rewards":
        return "greedy completions", ["params", "prompts", "rewards"]
    own = {"old_logprobs": "behaviour_logprobs", "old_entropy": "behaviour_entropy"}
    if name in own and step.keeps_record:
        return "the sampler's own", [own[name]]
    found = step.score(name)
    network = POLICY if found is None else found.network
    given = {POLICY: "params", "reference": "reference_params"}.get(network, "networks")
    what = f"{network} model" if network in step.networks and step.networks[network].head else network
    return f"{what} forward pass", [given, "tokens"]


def abstract_inputs(parts: Parts) -> tuple[TrainState, Work]:
    """The initial state and work of a step as shapes, without allocating memory."""
    config, c = parts.config, parts.step.composition
    rollout = config.rollout

    def prompts() -> Prompts:
        rows = prompts_handed(parts)
        number = jnp.zeros(rows, jnp.int32)
        completion = jnp.zeros((rows, rollout.max_completion_tokens), jnp.int32)
        prompt = jnp.zeros((rows, rollout.max_prompt_tokens), jnp.int32)
        demonstrated = {"demonstration_tokens": completion, "demonstration_length": number}
        fields = demonstrated if c.wanted & demonstrated.keys() else {}
        for column in prompt_columns(c.wanted):
            fields |= {f"{column}_tokens": prompt, f"{column}_length": number}
        if c.rollout is not None and c.rollout.selection is not None:
            fields |= {"item": number, "repeat": number}
        return Prompts(
            tokens=prompt,
            length=number,
            prompt_id=number,
            answer_tokens=completion,
            answer_length=number,
            fields=fields,
        )

    def written() -> Experience | None:
        if c.written is None:
            return None
        width, count = rollout.max_completion_tokens, c.written.rows
        several = {name: (numbers,) for name, numbers in c.written.widths}
        per_row = {name: (width,) if kind_of(name) == "token" else () for name in c.written.provides}
        known = {
            name: jnp.zeros((count, *shape, *several.get(name, ())), jnp.int32 if name.endswith("_tokens") else None)
            for name, shape in per_row.items()
        }
        return written_rows(
            jnp.zeros((count, rollout.max_prompt_tokens), jnp.int32),
            jnp.ones(count, jnp.int32),
            jnp.zeros(count, jnp.int32),
            jnp.zeros((count, width), jnp.int32),
            jnp.ones(count, jnp.int32),
            answer_width=width if c.rollout is not None else 1,
            rows_per_group=c.written.rows_per_group,
            alone=c.rollout is None,
            **known,
        )

    given = jax.eval_shape(prompts) if c.rollout is not None else None
    state = jax.eval_shape(partial(initial_state, c), jax.random.key(0), None, given_shapes(c.networks))
    state = state if c.placed is None else abstract_like(state, c.placed)
    if given is not None:
        prepared(c, given)
    work = given_work(given, jax.eval_shape(written))
    if parts.step.priming:
        ahead = _last_work(parts.step.priming, state, work)["rows"]
        state = state.replace(store={**state.store, "ahead": ahead})
    return state, work


def _last_work(segments: Any, state: TrainState, work: Work) -> Work:
    """Work after segments that do not end a step, as shapes."""
    (*_, (program, before)) = shapes(segments, state, work)
    return before | jax.eval_shape(program.run, state, before)


def trace(parts: Parts) -> Experience:
    """The rows of one step as shapes. Detects wrong sizes and hyper-parameters without computing anything.

    Raises:
      ValueError: from the part of the step that refuses its input.
    """
    return step_shapes(parts)[-1]


def metric_names(parts: Parts) -> set[str]:
    """Names of the metrics that every step of a run writes to metrics.jsonl."""
    return {*step_shapes(parts)[1], "learning_rate", "seconds", "tokens_per_second"}


def step_shapes(parts: Parts) -> tuple[TrainState, dict[str, Any], Experience]:
    """(state, metrics, rows) after one step, as shapes."""
    state, work = abstract_inputs(parts)
    (*_, (program, before)) = shapes(parts.step.segments, state, work)
    return jax.eval_shape(program.run, state, before)


def explanation(parts: Parts) -> dict[str, Any]:
    """The composed step of a config as plain data; compiles the step's programs to count their work.

    Returns:
      stages, hyper_parameters: see the functions of these names. shapes: name -> dtype[shape] of the experience that
      one step fills in. sizes: parameters, sequences, tokens, updates. widths: see `width_shares`. programs: for each
      compiled program of the widest prompts FLOPs, bytes accessed and temporary memory, as XLA's cost model counts
      them (a loop body counts once, however often it runs).
    """
    step, programs, rows = parts.step, programs_with_inputs(parts), trace(parts)
    return {
        "stages": stages(step.composition),
        "hyper_parameters": hyper_parameters(step.composition),
        "shapes": _shapes(rows),
        "sizes": sizes(parts, programs[0].inputs[0], rows),
        "widths": width_shares(parts),
        "programs": [_cost(name, program.lower(*given).compile()) for name, program, given in programs],
    }


def sizes(parts: Parts, state: TrainState, rows: Experience) -> dict[str, int]:
    """The resulting sizes of a config, computed from the shapes of the state and of the rows of one step."""
    training, sampled = parts.config.training, parts.step.composition.rollout is not None
    count, width = rows.tokens.shape
    return {
        "parameters": parameter_count(parts.model.specs),
        "trainable_parameters": parameter_count(trainable_part(parts.model, parts.model.specs)),
        **({"prompts_per_step": training.prompts_per_step} if sampled else {}),
        "sequences_per_step": count,
        "completion_tokens_per_step_at_most": count * width,
        "prompt_tokens_per_step_at_most": count * rows.prompt_tokens.shape[1],
        "updates_per_step": training.epochs_per_batch * training.minibatches_per_epoch,
        "state_bytes": state_bytes(state),
    }


def state_bytes(state: TrainState) -> int:
    """Bytes of all arrays of a state, each counted once."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(state))


class Program(NamedTuple):
    """One compiled program of a step, with the shapes of its inputs."""

    name: str
    program: Any
    inputs: tuple[Any, ...]


def programs_with_inputs(parts: Parts) -> list[Program]:
    """The programs of a step in order; the state is the first input of each."""
    state, work = abstract_inputs(parts)
    found = shapes(parts.step.segments, state, work)
    if len(found) == 1:
        return [Program("whole step", found[0][0].run, (state, found[0][1]))]
    return [Program(program.name, program.run, (state, given)) for program, given in found]


def evaluation_program(parts: Parts, device_bytes: float | None = None) -> Program | None:
    """The decoding program of a run's evaluation, at the widest prompts.

    Args:
      parts: of the run.
      device_bytes: memory of a device, which determines the number of completions decoded together.

    Returns:
      None without an evaluation, or with an environment in Python, which decodes turn by turn.
    """
    config, place = parts.config, parts.step.composition.resources.placement
    if not config.has_problems or isinstance(parts.environment, HostEnvironment):
        return None
    rows, rollout = 1 + config.evaluation.samples_per_problem, config.rollout
    together = evaluation_batch(config, parts.model, place.mesh, place.rules, device_bytes=device_bytes)
    problems = max(1, together // rows)
    program = decoding_program(
        parts.model,
        parts.tokenizer,
        rows,
        rollout.max_completion_tokens,
        config.evaluation.temperature,
        place.mesh,
        place.rules,
        place.gather_for_rollout,
        parts.environment,
        {},
    )

    def inputs() -> tuple[Prompts, Any, Any]:
        number = jnp.zeros(problems, jnp.int32)
        prompt, answer = ((problems, width) for width in (rollout.max_prompt_tokens, rollout.max_completion_tokens))
        prompts = Prompts(jnp.zeros(prompt, jnp.int32), number, number, jnp.zeros(answer, jnp.int32), number)
        return prompts, jnp.zeros(problems), jax.random.key(0)

    params = abstract_inputs(parts)[0].networks[POLICY].params
    return Program(f"evaluation of {problems} x {rows}", program, (params, *jax.eval_shape(inputs)))


def _shapes(experience: Experience) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in experience.known().items()}


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
