"""The phases of a composed step as pure functions of state and rows: collect, score, credit, learn, and their ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, KeyUse, Method, Prompts, Source, TrainState
from jaxrl_llm.parallel.rules import Rules, constrain_rows, decoding, laid_out, layout
from jaxrl_llm.rollout.decoding_weights import weights_for_decoding
from jaxrl_llm.rollout.generate import Prefixes, generate
from jaxrl_llm.rollout.round_options import Adaptive, Budget, Refill
from jaxrl_llm.rollout.turns import generate_turns
from jaxrl_llm.training import provide
from jaxrl_llm.training.composition import Composition, Rollout
from jaxrl_llm.training.credit import apply_credit
from jaxrl_llm.training.critics import HEADS, initial_critic, moved_target
from jaxrl_llm.training.external_engine import (
    engine_metrics,
    with_policy_view,
)
from jaxrl_llm.training.learn import alignment, checked_split, make_learn
from jaxrl_llm.training.metrics import experience_metrics
from jaxrl_llm.training.placement import (
    OFFLOADED,
    in_device_memory,
)
from jaxrl_llm.training.rounds import (
    REPORTED,
    SUCCESS,
    Loop,
    Request,
    adaptive_loop,
    never_visited,
    prompt_of_each_row,
    refill_loop,
    visited,
)
from jaxrl_llm.training.rows import (
    concatenated,
    greedy_last,
    initial_temperature,
    next_temperature,
    with_baseline,
    with_demonstrations,
)
from jaxrl_llm.training.score import traceable_components, with_rewards
from jaxrl_llm.training.stored import (
    check_widths,
    empty_store,
    joined,
    remembered,
    replayed,
)
from jaxrl_llm.training.trainable import reference_policy, trainable_part
from jaxrl_llm.training.wiring import call, fields_of, filled, names

EXTRA_TEMPERATURE = "temperature:extra"


def initial_state(c: Composition, key: Array, params: PyTree | None = None) -> TrainState:
    """A fresh state. Everything is copied, so the caller's arrays stay usable after the state is donated."""
    copied = partial(jax.tree.map, jnp.copy)
    at_start = jax.random.fold_in(key, KeyUse.INITIALISE)
    params = c.model.init(at_start) if params is None else copied(params)
    memory = {name: method.init() for name, method in c.stateful.items()}
    if c.rollout.extra is not None and isinstance(c.rollout.extra.temperature, Method):
        memory[EXTRA_TEMPERATURE] = initial_temperature(c.rollout.extra.temperature)
    if isinstance(c.rollout.rounds, Budget):
        memory[SUCCESS] = never_visited(c.rollout.rounds)
    critics = {}
    for number, name in enumerate(HEADS):
        if c.critic is not None and name in c.critics:
            critics[name] = initial_critic(c.model, c.critic, jax.random.fold_in(at_start, number), params, name)
    return TrainState(
        params=params,
        optimizer_state=c.optimizer.init(trainable_part(c.model, params)),
        reference_params=copied(trainable_part(c.model, params)) if c.copies_reference else None,
        # A method may use one zero array twice, and donation wants every buffer once.
        memory=copied(memory),
        key=jnp.copy(key),
        step=jnp.int32(0),
        critics=critics,
        replay=None
        if c.replay is None
        else empty_store(c.replay, c.rollout.samples_per_prompt, c.rollout.max_completion_tokens),
    )


def collect(c: Composition, state: TrainState, prompts: Prompts) -> Experience:
    """Prompts -> completions with the log-probabilities that they were drawn with.

    Groups of samples (the last of them a demonstration where the rollout says so), then the extra groups, then one
    greedy completion of each prompt where something compares rewards with its reward.
    """
    r, count = c.rollout, prompts.tokens.shape[0]
    extra = r.extra.groups(count) if r.extra else 0
    checked_split(c.update, count + extra, r.samples_per_prompt, c.losses, c.joined_groups)
    samples = r.samples_per_prompt - r.demonstration_in_group
    with_greedy = "baseline_rewards" in c.wanted
    temperature = jnp.full(samples + with_greedy, r.temperature).at[samples:].set(0.0)
    if r.environment is not None:
        weights, rules = _decoded_with(c, state)
        converse = laid_out(partial(generate_turns, c.model, weights, constrain=_decoded_rows), c.mesh, rules)
        talks = converse(
            prompts,
            state.key,
            state.step,
            cast(Any, r.environment),
            samples_per_prompt=samples + with_greedy,
            max_completion_tokens=r.max_completion_tokens,
            eos_ids=r.eos_ids,
            pad_id=r.pad_id,
            temperature=temperature if with_greedy else r.temperature,
        )
        return constrain_rows(greedy_last(talks, samples) if with_greedy else talks)
    sample = _sampler(c, state)
    if isinstance(r.rounds, Budget):
        prompt_of = prompt_of_each_row(r.rounds, state.memory[SUCCESS], prompts, r.samples_per_prompt)
        rows = count * r.samples_per_prompt
        return constrain_rows(sample(prompts, samples_per_prompt=rows, temperature=r.temperature, prompt_of=prompt_of))
    rows = sample(
        prompts,
        samples_per_prompt=samples + with_greedy,
        temperature=temperature if with_greedy else r.temperature,
        prefixes=_prefixes(r, count, samples + with_greedy),
    )
    if r.demonstration_in_group:
        rows = with_demonstrations(c.model, state.params, rows, prompts, temperature=r.temperature, pad_id=r.pad_id)
    if r.extra is not None:
        held = state.memory.get(EXTRA_TEMPERATURE)
        more = sample(
            jax.tree.map(lambda x: x[:extra], prompts),
            samples_per_prompt=r.samples_per_prompt,
            temperature=cast(float, r.extra.temperature) if held is None else held["temperature"],
            first_sample=r.samples_per_prompt,
            prefixes=_prefixes(r, extra, r.samples_per_prompt),
        )
        more = replace(more, group=more.group + count)
        rows = concatenated(
            filled(rows, extra=jnp.zeros(rows.tokens.shape[0], bool)),
            filled(more, extra=jnp.ones(more.tokens.shape[0], bool)),
        )
    return constrain_rows(greedy_last(rows, samples) if with_greedy else rows)


def _decoded_rows(rows):
    return constrain_rows(rows, name="decoded_rows")


def _decoded_with(c: Composition, state: TrainState) -> tuple[PyTree, Rules]:
    """Parameters as sampling reads them, and the table that it goes by."""
    rules = decoding(c.rules, gathered=c.gather_for_rollout)
    with layout(c.mesh, rules):
        weights = weights_for_decoding(c.model, state.params) if c.gather_for_rollout else state.params
    return weights, rules


def _sampler(c: Composition, state: TrainState) -> Callable[..., Experience]:
    """`generate` with everything that the calls of a step have in common, on the mesh as sampling lays it out."""
    r, (weights, rules) = c.rollout, _decoded_with(c, state)
    sample = partial(
        generate,
        c.model,
        weights,
        key=jax.random.fold_in(state.key, KeyUse.ROLLOUT),
        step=state.step,
        max_completion_tokens=r.max_completion_tokens,
        eos_ids=r.eos_ids,
        pad_id=r.pad_id,
        record_router=r.replay_router,
        slots=r.slots,
        controls=r.truncation,
        record_support=r.truncation is not None,
        constrain=_decoded_rows,
    )
    return laid_out(sample, c.mesh, rules)


def _prefixes(r: Rollout, prompts: int, samples: int) -> Prefixes | None:
    """What each sample of each prompt starts with."""
    if not r.prefixes:
        return None
    block = r.samples_per_prompt // len(r.prefixes)
    chosen = [r.prefixes[min(number // block, len(r.prefixes) - 1)] for number in range(samples)]
    width = max(1, max(map(len, chosen)))
    tokens = jnp.asarray([[*ids, *[r.pad_id] * (width - len(ids))] for ids in chosen], jnp.int32)
    length = jnp.asarray([len(ids) for ids in chosen], jnp.int32)
    tokens, length = jnp.tile(tokens, (prompts, 1)), jnp.tile(length, prompts)
    return Prefixes(tokens, length, jnp.full(tokens.shape, Source.HINT, jnp.int8))


def score(c: Composition, experience: Experience) -> Experience:
    """Completions -> one column for each reward; host rewards fill theirs after this program."""
    components = traceable_components(c.rewards, experience)
    return constrain_rows(replace(experience, reward_components=components))


def credit(c: Composition, state: TrainState, experience: Experience) -> tuple[Experience, dict[str, Any]]:
    """Reward components -> rewards -> advantages and whatever else the credit list fills in."""
    experience = with_rewards(experience, c.rewards)
    if "baseline_rewards" in c.wanted:
        experience = with_baseline(experience, c.rollout.samples_per_prompt)
    # One forward function: the sampler's numbers are the trainer's.
    experience = _viewed(c, state, experience, own_samples=c.keeps_record, rows_are_groups=c.equal_groups)
    by_vocabulary = provide.over_vocabulary(
        c.model, state.params, experience, c.credit, temperature=c.rollout.temperature
    )
    return apply_credit(c.credit, experience, state.memory, state.step, by_vocabulary)


def _viewed(
    c: Composition, state: TrainState, rows: Experience, *, own_samples: bool, rows_are_groups: bool = False
) -> Experience:
    """Rows with everything that is wanted of policy, reference and critics before the update."""
    temperature = c.rollout.temperature
    reference = reference_policy(c.model, in_use(c, state, "reference"))
    # On one device the pieces are rows that follow one another, and so may be whole groups.
    at_once, together = c.update.sequences_per_microbatch, c.mesh is None or c.mesh.size == 1
    whole = not at_once or (together and at_once % c.rollout.samples_per_prompt == 0)
    samples = c.rollout.samples_per_prompt if rows_are_groups and whole else 1

    def viewed(rows: Experience) -> Experience:
        rows = provide.policy_view(
            c.model, state.params, rows, c.wanted, temperature=temperature, own_samples=own_samples
        )
        if "reference_logprobs" in c.wanted:
            known = provide.reference_logprobs(
                c.model, reference, rows, temperature=temperature, samples_per_prompt=samples
            )
            rows = replace(rows, reference_logprobs=known)
        return provide.critic_view(c.model, state.params, state.critics, rows, c.wanted)

    if not provide.needs_a_pass(c.wanted, own_samples=own_samples):
        return viewed(rows)
    return provide.by_microbatch(viewed, rows, at_once, together=together)


def join(
    c: Composition, state: TrainState, experience: Experience, stored: Experience | None
) -> tuple[Experience, Experience | None]:
    """The batch with rows of other origin behind it, and the replay store with this batch in it."""
    samples, store, parts = c.rollout.samples_per_prompt, state.replay, []
    if c.replay is not None and store is not None:
        again = replayed(store, state.key, state.step, c.replay, samples)
        parts.append(_viewed(c, state, again, own_samples=False))
        store = remembered(store, experience, state.step, c.replay)
    if c.stored is not None:
        if stored is None:
            raise ValueError("this step learns from stored rows too: call step(state, prompts, items, stored)")
        check_widths(experience, stored)
        if stored.tokens.shape[0] != c.stored.groups * samples:
            raise ValueError(
                f"stored has {stored.tokens.shape[0]} rows, but this step was composed for {c.stored.groups} groups of "
                f"{samples}; hand it that many"
            )
        parts.append(stored)
    for part in parts:
        experience = joined(experience, part, samples)
    return (constrain_rows(experience) if parts else experience), store


def coefficients(
    c: Composition, experience: Experience, metrics: dict[str, Array], memory: dict[str, Any], step: Array
) -> tuple[list[Array], dict[str, Any]]:
    """The factor of each loss in this step, and the memory of those that remember something."""
    provided = fields_of(experience) | metrics | {"step": step}
    values, memory = [], dict(memory)
    for term in c.losses:
        value = term.coefficient
        if isinstance(value, Method):
            value, memory[term.memory_name] = call(value, provided, memory[term.memory_name])
        elif callable(value):
            value = call(value, provided)
        values.append(jnp.asarray(value, jnp.float32))
    return values, memory


def measured_alignment(c: Composition, state: TrainState, batch: Experience) -> Array:
    """`alignment` at every so many steps, 0 at the others."""
    measure = partial(
        alignment,
        c.model,
        c.losses,
        temperature=c.rollout.temperature,
        learning_rate=c.update.alignment_learning_rate,
    )
    due = state.step % c.update.alignment_every_steps == 0
    return jax.lax.cond(due, measure, lambda state, batch: jnp.float32(0.0), state, batch)


def learn(
    c: Composition, state: TrainState, experience: Experience, factors: list[Array]
) -> tuple[TrainState, dict[str, Array]]:
    """Experience -> new parameters of policy and critics, and the reference refreshed where that is due."""
    update = make_learn(
        c.model,
        c.optimizer,
        c.losses,
        c.update,
        temperature=c.rollout.temperature,
        samples_per_prompt=c.rollout.samples_per_prompt,
        critic=c.critic,
        joined=c.joined_groups,
        equal_groups=c.equal_groups,
    )
    by_reference = c.update.refreshes_reference or c.update.reference_decay is not None
    by_reference |= any("over_vocabulary" in names(term.function) for term in c.losses)
    read = ("optimizer", "reference") if by_reference else ("optimizer",)
    state, metrics = update(in_use(c, state, *read), experience, factors)
    for term, factor in zip(c.losses, factors, strict=True):
        if term.coefficient_changes:
            metrics[f"coefficient/{term.name}"] = factor
    if c.critic is not None:
        state = replace(state, critics={name: moved_target(one, c.critic) for name, one in state.critics.items()})
    return state, metrics


def sample_and_score(c: Composition, state: TrainState, prompts: Prompts) -> Experience:
    """The first half of a step: what comes before rewards on the host."""
    loop = rounds_of(c, prompts)
    if loop is None:
        return score(c, collect(c, state, prompts))

    def one(carry):
        return loop.merge(carry, with_rewards(sample_round(c, state, prompts, loop.request(carry)), c.rewards))

    carry = jax.lax.while_loop(loop.unfinished, one, first_carry(c, loop, state, prompts))
    return rounds_result(loop, carry)


def rounds_of(c: Composition, prompts: Prompts) -> Loop | None:
    """The rounds that a step samples in; None where it samples once."""
    count, samples = prompts.tokens.shape[0], c.rollout.samples_per_prompt
    if isinstance(c.rollout.rounds, Refill):
        most = c.rollout.rounds.max_rounds
        if count % most:
            raise ValueError(
                f"rollout.refill.max_rounds is {most}, but the step was handed {count} prompts; hand it {most} times "
                "the prompts that it learns from"
            )
        return refill_loop(c.rollout.rounds, prompts=count // most, samples=samples)
    if isinstance(c.rollout.rounds, Adaptive):
        return adaptive_loop(c.rollout.rounds, prompts=count, samples=samples)
    return None


def sample_round(c: Composition, state: TrainState, prompts: Prompts, request: Request) -> Experience:
    """One round of completions, scored as far as the program can."""
    r, count = c.rollout, request.active.shape[0]
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, request.first_prompt, count), prompts)
    rows = _sampler(c, state)(
        part,
        samples_per_prompt=r.rounds.samples_per_round if isinstance(r.rounds, Adaptive) else r.samples_per_prompt,
        temperature=r.temperature,
        first_sample=request.first_sample,
        active=request.active,
    )
    return score(c, rows)


def first_carry(c: Composition, loop: Loop, state: TrainState, prompts: Prompts) -> Any:
    """What is kept before the first round."""
    count = prompts.tokens.shape[0] // (c.rollout.rounds.max_rounds if isinstance(c.rollout.rounds, Refill) else 1)
    request = Request(jnp.int32(0), jnp.int32(0), jnp.ones(count, bool))
    rows = lambda: with_rewards(sample_round(c, state, prompts, request), c.rewards)  # noqa: E731
    return loop.start(jax.eval_shape(rows))


def rounds_result(loop: Loop, carry: Any) -> Experience:
    """The rows of the step; what is to be reported stands on each of them."""
    rows, report = loop.result(carry)
    count = rows.tokens.shape[0]
    return filled(rows, **{name: jnp.full(count, value, jnp.float32) for name, value in report.items()})


def view_and_score(c: Composition, state: TrainState, rows: Experience) -> Experience:
    """The same for rows that an engine has sampled."""
    return score(c, with_policy_view(c, state, constrain_rows(rows)))


def credit_and_learn(
    c: Composition, state: TrainState, experience: Experience, stored: Experience | None = None
) -> tuple[TrainState, dict[str, Array], Experience]:
    """The second half of a step: what comes after rewards on the host."""
    sampled = experience.weight
    experience, memory = credit(c, state, experience)
    metrics = experience_metrics(experience, sampled[: experience.weight.shape[0]])
    if c.external is not None:
        metrics |= engine_metrics(experience)
    if c.rollout.off_policy_steps:
        metrics["staleness_steps"] = jnp.minimum(state.step, c.rollout.off_policy_steps).astype(jnp.float32)
    metrics |= {name: values[0] for name, values in experience.extras.items() if name in REPORTED}
    if SUCCESS in memory:
        memory[SUCCESS] = visited(memory[SUCCESS], experience)
    batch, store = join(c, state, experience, stored)
    if c.update.alignment_every_steps:
        metrics["alignment"] = measured_alignment(c, state, batch)
    factors, memory = coefficients(c, experience, metrics, memory, state.step)
    if (held := memory.get(EXTRA_TEMPERATURE)) is not None:
        metrics["extra_temperature"] = held["temperature"]
        memory[EXTRA_TEMPERATURE] = next_temperature(cast(Any, c.rollout.extra).temperature, held, experience)
    state, learned = learn(c, state, batch, factors)
    state = replace(state, memory=memory, replay=store)
    return put_back(c, state), metrics | learned, experience


def in_use(c: Composition, state: TrainState, *names: str) -> TrainState:
    """The state with these parts, where they are kept in the host's memory, brought to the devices."""
    read = [OFFLOADED[name] for name in names if name in c.offload]
    return replace(state, **{f: in_device_memory(getattr(state, f), getattr(c.placed, f)) for f in read})


def put_back(c: Composition, state: TrainState) -> TrainState:
    """The state where it is kept between steps."""
    if c.placed is None:
        return state
    state = replace(state, **{f: jax.device_put(getattr(state, f), getattr(c.placed, f)) for f in offloaded(c)})
    pinned = [f.name for f in fields(state) if f.name not in offloaded(c)]
    constrain = partial(jax.tree.map, jax.lax.with_sharding_constraint)
    return replace(state, **{f: constrain(getattr(state, f), getattr(c.placed, f)) for f in pinned})


def offloaded(c: Composition) -> list[str]:
    return [OFFLOADED[name] for name in sorted(c.offload)]


def sample_ahead(c: Composition, state: TrainState, prompts: Prompts) -> Experience:
    """The batch of the next step, by the policy of this one."""
    return score(c, collect(c, replace(state, step=state.step + 1), prompts))


def primed(c: Composition, state: TrainState, prompts: Prompts) -> TrainState:
    """A state that holds its first batch."""
    return replace(state, ahead=score(c, collect(c, state, prompts)))


def step_behind(c: Composition, state: TrainState, prompts: Prompts, stored: Experience | None = None):
    """Learn from the batch that is there and sample the next one, in one program; neither waits for the other."""
    ahead = sample_ahead(c, state, prompts)
    new, metrics, experience = credit_and_learn(c, replace(state, ahead=None), cast(Experience, state.ahead), stored)
    return replace(new, ahead=ahead), metrics, experience


def whole_step(c: Composition, state: TrainState, prompts: Prompts, stored: Experience | None = None):
    """collect, score, credit, learn, in one program."""
    return credit_and_learn(c, state, sample_and_score(c, state, prompts), stored)
