"""Collect: the rows of a step. Each function returns parts that put `rows` into the work of a step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.experience import Experience, KeyUse, Prompts, TrainState
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import constrain_rows, decoding, laid_out, layout
from jaxrl_llm.rollout.decoding_weights import weights_for_decoding
from jaxrl_llm.rollout.environment_checks import require_environment
from jaxrl_llm.rollout.environments import Environment
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rollout.hand_over import External, engine_rows
from jaxrl_llm.rollout.host_conversations import HostTurns, host_generate_turns, host_turns, host_turns_shapes
from jaxrl_llm.rollout.host_environments import HostEnvironment, opened
from jaxrl_llm.rollout.plans import Request
from jaxrl_llm.rollout.plans.plan import concatenated, request_rows
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.rollout.turns import generate_turns
from jaxrl_llm.rows import (
    check_widths,
    empty_store,
    joined,
    remembered,
    replayed,
)
from jaxrl_llm.terms import Fill
from jaxrl_llm.training.checks import checked_split, replayed_fields
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.reading import item_numbers, reading_part
from jaxrl_llm.training.segments import Host, Placement, Repeat, Traced, Work
from jaxrl_llm.training.waiting_demonstrations import asked_for, empty_demonstrations

PLAN, SELECTION = "rollout:plan", "selection"


def collected(c: Composition, rewards: Sequence[Any], *, ahead: bool = False) -> list[Any]:
    """Prompts -> rows: the rounds of the plan, with rewards if the plan reads them.

    Args:
      c: the composition of the step.
      rewards: parts that compute the rewards of `drawn`.
      ahead: sample the rows of the next step.
    """
    plan = c.plan
    draw = _draw(c, ahead)
    scored = _readings(c) + (list(rewards) if plan.reads_rewards else [])
    body = [draw, *scored, Traced("plan", lambda state, work: {"carry": plan.merge(work["carry"], work["drawn"])})]
    start: Any = Traced("plan", partial(_first_carry, c, draw, scored, ahead))
    if plan.most_rounds == 1 and not plan.unrolled and isinstance(draw, Host):  # no computation, so no separate program
        start = Host("plan", lambda state, work, context: {"carry": None}, lambda state, work: {"carry": None})
    if plan.most_rounds == 1 or plan.unrolled:
        rounds = body * plan.most_rounds
    else:
        rounds = [Repeat(tuple(body), plan.unfinished)]

    def result(state: TrainState, work: Work) -> Work:
        rows, report = plan.result(work["carry"])
        checked_split(c, rows.tokens.shape[0] // c.samples)
        return {"rows": constrain_rows(rows), "report": {n: jnp.float32(v) for n, v in report.items()}}

    return [start, *rounds, Traced("plan", result)]


def _readings(c: Composition) -> list[Any]:
    """Parts with the plan's readings of the texts of a round."""
    terms = [Fill(name, function, name=name) for name, function in c.plan.readings]
    names = {name: (name,) for name, _ in c.plan.readings}
    return [reading_part("reading", terms, names, "drawn", c.samples)] if terms else []


def _first_carry(c: Composition, draw: Any, rewards: Sequence[Any], ahead: bool, state: TrainState, work: Work) -> Work:
    prompts, plan = work["prompts"], c.plan
    if plan.most_rounds == 1 and not plan.unrolled:
        groups = prompts.tokens.shape[0]
        checked_split(c, groups + c.plan.extra_groups(groups))
        return {"carry": None}
    step = state.step + 1 if ahead else state.step
    key = jax.random.fold_in(jax.random.fold_in(state.key, KeyUse.PLAN), step)
    rows: Any = None
    if not plan.unrolled:
        # The shapes of the carry are those after one round.
        def one(state: TrainState, work: Work) -> Experience:
            done: Work = work | {"carry": None}
            for part in (draw, *rewards):
                shapes = part.function if isinstance(part, Traced) else _zeros_of(part.shapes)
                done = done | shapes(state, done)
            return done["drawn"]

        rows = jax.eval_shape(one, state, work)
    return {"carry": plan.init(state.memory.get(PLAN), key, prompts, rows)}


def _zeros_of(shapes: Any) -> Any:
    return lambda state, work: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(state, work))


def _draw(c: Composition, ahead: bool) -> Any:
    """The part that samples the requests of the plan."""
    r = _rollout(c)
    if r.engine is not None:
        return Host("engine", partial(_by_engine, c, r.engine), partial(_drawn_shapes, c))
    if isinstance(r.environment, HostEnvironment):
        turns = _talks(c)
        return Host("conversations", partial(_by_host_environment, c, turns), partial(_talk_shapes, c, turns))

    def sampled(state: TrainState, work: Work) -> Work:
        state = replace(state, step=state.step + 1) if ahead else state
        requests = c.plan.requests(state.memory.get(PLAN), work["carry"], work["prompts"])
        sample = _sampler(c, state)
        return {"drawn": concatenated(*(request_rows(request, sample(request)) for request in requests))}

    return Traced("collect", sampled)


def _rollout(c: Composition) -> Rollout:
    assert c.rollout is not None  # ensured by `checked`
    return c.rollout


def _decoded_rows(rows):
    return constrain_rows(rows, name="decoded_rows")


def sampling_layout(place: Placement, model: Model, params: PyTree) -> tuple[Any, PyTree]:
    """The sharding rules of sampling, and the parameters in this sharding."""
    rules = decoding(place.rules, gathered=place.gather_for_rollout)
    with layout(place.mesh, rules):
        return rules, weights_for_decoding(model, params) if place.gather_for_rollout else params


def _sampler(c: Composition, state: TrainState) -> Any:
    """Request -> rows, with the sharding rules of sampling."""
    r, place = _rollout(c), c.resources.placement
    rules, weights = sampling_layout(place, c.model, state.params)
    sizes: dict[str, Any] = {
        "max_completion_tokens": r.max_completion_tokens,
        "eos_ids": r.eos_ids,
        "pad_id": r.pad_id,
        "constrain": _decoded_rows,
    }
    if isinstance(r.environment, Environment):
        environment = r.environment
        converse = laid_out(partial(generate_turns, c.model, weights, **sizes), place.mesh, rules)

        def talk(request: Request) -> Experience:
            return converse(
                request.prompts,
                state.key,
                state.step,
                environment,
                samples_per_prompt=request.samples_per_prompt,
                temperature=r.temperature if request.temperature is None else request.temperature,
                first_sample=request.first_sample,
                active=request.active,
            )

        return talk
    complete = partial(
        generate,
        c.model,
        weights,
        key=jax.random.fold_in(state.key, KeyUse.ROLLOUT),
        record_router=r.replay_router,
        slots=r.slots,
        controls=r.truncation,
        record_support=r.truncation is not None,
        **sizes,
    )
    complete = laid_out(complete, place.mesh, rules)

    def one(request: Request) -> Experience:
        return complete(
            request.prompts,
            step=state.step if request.begun is None else state.step - request.begun,
            samples_per_prompt=request.samples_per_prompt,
            temperature=r.temperature if request.temperature is None else request.temperature,
            limit=request.limit,
            stop_ids=request.stop_ids,
            prefixes=request.prefixes,
            pause=request.pause,
            first_sample=request.first_sample,
            prompt_of=request.prompt_of,
            active=request.active,
        )

    return one


# ---- engines and environments in Python -----------------------------------------------------------------------------


def _host_requests(c: Composition, state: TrainState, work: Work) -> tuple[Request, ...]:
    return c.plan.requests(state.memory.get(PLAN), work["carry"], work["prompts"])


def _by_engine(c: Composition, engine: External, state: TrainState, work: Work, context: Any) -> Work:
    """Rows sampled by an external engine, whose log-probabilities are those of the behaviour policy."""
    r = _rollout(c)
    parts = []
    for request in _host_requests(c, state, work):
        rows = engine_rows(
            engine,
            c.model,
            state,
            request.prompts,
            samples_per_prompt=request.samples_per_prompt,
            first_sample=request.first_sample,
            max_completion_tokens=r.max_completion_tokens,
            eos_ids=tuple(r.eos_ids),
            pad_id=r.pad_id,
            temperature=r.temperature,
        )
        parts.append(request_rows(request, rows))
    return {"drawn": parts[0] if len(parts) == 1 else concatenated(*parts)}


def _drawn_shapes(c: Composition, state: TrainState, work: Work) -> Work:
    """The shapes of the rows of an engine: the same as those of the sampler."""
    r = replace(_rollout(c), engine=None)
    inside = replace(c, sources=(r, *(s for s in c.sources if not isinstance(s, Rollout))))

    def rows(state: TrainState, work: Work) -> Experience:
        requests = c.plan.requests(state.memory.get(PLAN), work["carry"], work["prompts"])
        sample = _sampler(inside, state)
        drawn = concatenated(*(request_rows(request, sample(request)) for request in requests))
        return drawn.filled(staleness=jnp.zeros(drawn.tokens.shape[0]))

    return {"drawn": jax.eval_shape(rows, state, work)}


def _talks(c: Composition) -> HostTurns:
    """Programs for conversations with an environment in Python."""
    r, resources = _rollout(c), c.resources
    assert isinstance(r.environment, HostEnvironment)
    assert resources.encode is not None
    assert resources.decode is not None
    return host_turns(
        c.model,
        r.environment,
        samples_per_prompt=c.plan.drawn,
        max_completion_tokens=r.max_completion_tokens,
        eos_ids=r.eos_ids,
        pad_id=r.pad_id,
        encode=resources.encode,
        decode=resources.decode,
        temperature=r.temperature,
        constrain=constrain_rows,
    )


def _by_host_environment(c: Composition, turns: HostTurns, state: TrainState, work: Work, context: Any) -> Work:
    """Conversations with an environment in Python, which is opened for this step if it is not open."""
    (request,) = _host_requests(c, state, work)
    asked, handed = (np.asarray(jax.device_get(prompts.prompt_id)) for prompts in (request.prompts, work["prompts"]))
    items = context.required_items()
    items = [items[number] for number in item_numbers(asked, np.arange(len(asked)), handed, items)]
    arguments = turns, state.params, request.prompts, items, state.key, state.step
    with opened(turns.environment) if context.call is None else nullcontext(context.call) as call:
        rows = host_generate_turns(*arguments, call, first_sample=request.first_sample)
    return {"drawn": request_rows(request, rows)}


def _talk_shapes(c: Composition, turns: HostTurns, state: TrainState, work: Work) -> Work:
    def prompts(state: TrainState, work: Work) -> Any:
        (request,) = _host_requests(c, state, work)
        return request.prompts

    asked = jax.eval_shape(prompts, state, work)
    return {"drawn": host_turns_shapes(turns, state.params, asked, state.key, state.step)}


# ---- rows that were not sampled in this step ------------------------------------------------------------------------


def handed(c: Composition) -> list[Any]:
    """The rows passed by the caller become the rows of the step."""
    return [Traced("rows", lambda state, work: {"rows": constrain_rows(_handed(c, work)), "report": {}})]


def _handed(c: Composition, work: Work) -> Experience:
    rows, source = work.get("written"), c.written
    assert source is not None
    if rows is None:
        raise ValueError("this step trains on written rows: call step(state, prompts, items, written)")
    if rows.tokens.shape[0] != source.rows:
        raise ValueError(
            f"written has {rows.tokens.shape[0]} rows, but this step was composed for {source.rows}; pass that many"
        )
    return rows


def join(c: Composition, state: TrainState, rows: Experience, work: Work, viewed: Any) -> tuple[Experience, dict, dict]:
    """(the batch with written and replayed rows appended, the store updated with this batch, metrics).

    Args:
      c, state, work: of the step.
      rows: the sampled rows, after credit.
      viewed: rows -> rows with the outputs of networks before the update.
    """
    store, parts, numbers = dict(state.store), [], {}
    if c.replay is not None:
        again = replayed(store["replay"], state.key, state.step, c.replay, c.samples)
        parts.append(viewed(again))
        store["replay"] = remembered(store["replay"], rows, state.step, c.replay)
    if c.written is not None and c.rollout is not None:
        written = _handed(c, work)
        check_widths(rows, written)
        parts.append(written)
    if c.hardest is not None:
        store["hardest"], asked = asked_for(store["hardest"], rows, c.hardest)
        parts.append(asked)
        numbers["demonstrations/learned"] = asked.weight.sum()
        numbers["demonstrations/waiting"] = store["hardest"].weight.sum()
    batch = rows
    for part in parts:
        batch = joined(batch, part, c.samples)
    return (constrain_rows(batch) if parts else batch), store, numbers


def first_store(c: Composition) -> dict[str, Experience]:
    """The store before the first step."""
    store = {}
    if c.replay is not None:
        store["replay"] = empty_store(c.replay, c.samples, _rollout(c).max_completion_tokens, replayed_fields(c))
    if c.hardest is not None:
        store["hardest"] = empty_demonstrations(c.hardest, _rollout(c).max_completion_tokens)
    return store


# ---- which prompts --------------------------------------------------------------------------------------------------


def _choice(c: Composition, memory: Any, key: Any, step: Any) -> Any:
    r = _rollout(c)
    assert r.selection is not None  # ensured by `checked`
    assert r.prompts_per_step is not None
    key = jax.random.fold_in(jax.random.fold_in(key, KeyUse.SELECTION), step)
    return r.selection.choose(memory, key, r.prompts_per_step * c.plan.prompts_per_group).astype(jnp.int32)


def first_choices(c: Composition, key: Any) -> dict[str, Any]:
    """Memory of the selection, and the prompts of the first two steps: indices of items [2, N]."""
    selection = _rollout(c).selection
    assert selection is not None
    memory = selection.init()
    return {"memory": memory, "choices": jnp.stack([_choice(c, memory, key, step) for step in (0, 1)])}


def kept_in_mind(
    c: Composition, state: TrainState, memory: dict[str, Any], rows: Experience
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(memory with selection and plan updated by the rows of a step, metrics of the selection)."""
    memory, told = dict(memory), {}
    if SELECTION in memory:
        memory[SELECTION] = _next_choices(c, state, memory[SELECTION], rows)
        report = getattr(_rollout(c).selection, "report", None)
        told = {} if report is None else report(memory[SELECTION]["memory"])
    if PLAN in memory:
        memory[PLAN] = c.plan.remember(memory[PLAN], rows)
    return memory, {f"selection/{name}": jnp.asarray(value, jnp.float32) for name, value in told.items()}


def _next_choices(c: Composition, state: TrainState, held: dict[str, Any], rows: Experience) -> dict[str, Any]:
    """The pending choices after a step: the prompts of the next step, and those of the one after it, chosen now."""
    selection = _rollout(c).selection
    assert selection is not None
    provided = rows.known() | {"step": state.step}
    memory = _updated(selection, provided, held["memory"])
    return {"memory": memory, "choices": jnp.stack([held["choices"][1], _choice(c, memory, state.key, state.step + 2)])}


def _updated(selection: Any, provided: dict[str, Any], memory: Any) -> Any:
    """The memory of a selection after a step; `update` gets the memory and the fields that it names."""
    names = list(inspect.signature(selection.update).parameters)[1:]
    return selection.update(memory, **{name: provided[name] for name in names if name in provided})


def prepared(c: Composition, prompts: Prompts) -> None:
    """Check an environment inside the program with prompts of the widths of the run."""
    r = c.rollout
    if r is not None and isinstance(r.environment, Environment):
        require_environment(r.environment, prompts, vocabulary_size=c.model.vocabulary_size)
