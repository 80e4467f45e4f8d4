"""The training step: collect, score, credit, learn.

    step = learn . credit . score . collect          state, metrics = step(state, prompts)

When every reward is traceable the step is one XLA program. When a reward reads text it is the same composition
with the host call between two jitted halves; the caller writes the same thing in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, KeyUse, Method, Prompts, Source, TrainState
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.mesh import constrain_replicated, replicate, row_constraint
from jaxrl_llm.rollout.generate import Prefixes, generate
from jaxrl_llm.training import provide
from jaxrl_llm.training.checks import wanted_fields
from jaxrl_llm.training.credit import CreditTerm, apply_credit
from jaxrl_llm.training.critics import HEADS, Critic, critics_named, initial_critic, moved_target
from jaxrl_llm.training.external_engine import (
    STALENESS,
    External,
    check_external,
    engine_metrics,
    make_collect,
    with_policy_view,
)
from jaxrl_llm.training.learn import ROUTER, LossTerm, Update, alignment, checked_split, make_learn
from jaxrl_llm.training.metrics import experience_metrics
from jaxrl_llm.training.rows import (
    Extra,
    concatenated,
    greedy_last,
    initial_temperature,
    next_temperature,
    with_baseline,
    with_demonstrations,
)
from jaxrl_llm.training.score import RewardTerm, host_components, traceable_components, with_rewards
from jaxrl_llm.training.stored import (
    Replay,
    StoredRows,
    check_widths,
    empty_store,
    joined,
    remembered,
    replayed,
)
from jaxrl_llm.training.trainable import reference_policy, trainable_part
from jaxrl_llm.training.wiring import call, fields_of, filled, names, signature

EXTRA_TEMPERATURE = "temperature:extra"


@dataclass(frozen=True)
class Rollout:
    """How completions are sampled.

    Attributes:
      samples_per_prompt: completions drawn for each prompt.
      max_completion_tokens: longest completion, end of sequence included.
      eos_ids: tokens that end a completion.
      pad_id: token that fills the rest; may be one of `eos_ids`.
      temperature: of the softmax, above 0; the trainer scores at the same temperature.
      demonstration_in_group: the last sample of each group is the prompt's reference completion.
      prefixes: token ids that completions start with, one tuple for each equal block of a prompt's samples; they are
        hints, not trained on.
      extra: groups sampled on top at another temperature.
      replay_router: a mixture of experts learns through the experts that sampled each token.
    """

    samples_per_prompt: int
    max_completion_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    demonstration_in_group: bool = False
    prefixes: tuple[tuple[int, ...], ...] = ()
    extra: Extra | None = None
    replay_router: bool = False

    def __post_init__(self):
        if self.prefixes and self.samples_per_prompt % len(self.prefixes):
            raise ValueError(
                f"rollout.prefixes has {len(self.prefixes)} texts, which do not divide rollout.samples_per_prompt "
                f"{self.samples_per_prompt} into equal blocks; take a multiple"
            )
        longest = max(map(len, self.prefixes), default=0)
        if longest >= self.max_completion_tokens:
            raise ValueError(
                f"rollout.prefixes holds a text of {longest} tokens, which leaves nothing of "
                f"rollout.max_completion_tokens {self.max_completion_tokens}; shorten it or raise the limit"
            )
        if self.demonstration_in_group and self.samples_per_prompt < 2:
            raise ValueError(
                f"rollout.demonstration_in_group is true with rollout.samples_per_prompt {self.samples_per_prompt}; "
                "the demonstration is one of them, so use at least 2"
            )
        if self.demonstration_in_group and self.prefixes:
            raise ValueError(
                "rollout.demonstration_in_group is true and rollout.prefixes is set; a reference completion has no "
                "prefix, so leave one of them out"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}; training samples need a temperature above 0 "
                "(greedy decoding is for evaluation)"
            )


@dataclass(frozen=True)
class Composition:
    """What a step is composed of, checked. The stages below are functions of it and of arrays.

    Attributes:
      model: the policy.
      optimizer: an optax transformation.
      rollout: how completions are sampled.
      rewards, credit, losses: the functions of each stage.
      update: epochs, minibatches, microbatches, reference refresh.
      wanted: on-demand fields that something names, and so the step computes.
      mesh: devices that rows are spread over, or None.
      critic: how value models and their like are made.
      stored: rows that every step is handed beside the prompts.
      replay: learning again from rows of earlier steps.
      external: an engine that samples in the place of `collect`.
    """

    model: Model
    optimizer: optax.GradientTransformation
    rollout: Rollout
    rewards: tuple[RewardTerm, ...]
    credit: tuple[CreditTerm, ...]
    losses: tuple[LossTerm, ...]
    update: Update
    wanted: frozenset[str]
    mesh: jax.sharding.Mesh | None
    critic: Critic | None = None
    stored: StoredRows | None = None
    replay: Replay | None = None
    external: External | None = None

    @property
    def joined_groups(self) -> int:
        """Groups that learn without having been sampled in the step."""
        return (self.stored.groups if self.stored else 0) + (self.replay.groups if self.replay else 0)

    @property
    def critics(self) -> tuple[str, ...]:
        """Names of the critics that something asks for."""
        everything = [t.function for t in (*self.credit, *self.losses)]
        return critics_named(frozenset().union(*(signature(f).required for f in everything)))

    @property
    def with_reference(self) -> bool:
        """Whether something compares the policy with a reference."""
        return "reference_logprobs" in self.wanted or any("over_vocabulary" in names(t.function) for t in self.losses)

    @property
    def copies_reference(self) -> bool:
        """Whether the state holds a copy for the reference. A policy with adapters can have its base as one."""
        needed = self.model.trained is None or self.update.snapshot_reference or self.update.refreshes_reference
        return self.with_reference and needed

    @property
    def stateful(self) -> dict[str, Method]:
        """Methods that remember something, by the name of their memory."""
        methods = {t.memory_name: t.function for t in self.credit if isinstance(t.function, Method)}
        return methods | {t.memory_name: t.coefficient for t in self.losses if isinstance(t.coefficient, Method)}


def initial_state(c: Composition, key: Array, params: PyTree | None = None) -> TrainState:
    """A fresh state. Everything is copied, so the caller's arrays stay usable after the state is donated."""
    copied = partial(jax.tree.map, jnp.copy)
    at_start = jax.random.fold_in(key, KeyUse.INITIALISE)
    params = c.model.init(at_start) if params is None else copied(params)
    memory = {name: method.init() for name, method in c.stateful.items()}
    if c.rollout.extra is not None and isinstance(c.rollout.extra.temperature, Method):
        memory[EXTRA_TEMPERATURE] = initial_temperature(c.rollout.extra.temperature)
    critics = {}
    for number, name in enumerate(HEADS):
        if c.critic is not None and name in c.critics:
            critics[name] = initial_critic(c.model, c.critic, jax.random.fold_in(at_start, number), params, name)
    state = TrainState(
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
    return state if c.mesh is None else replicate(state, c.mesh)


def collect(c: Composition, state: TrainState, prompts: Prompts) -> Experience:
    """Prompts -> completions with the log-probabilities that they were drawn with.

    Groups of samples (the last of them a demonstration where the rollout says so), then the extra groups, then one
    greedy completion of each prompt where something compares rewards with its reward.
    """
    r, count = c.rollout, prompts.tokens.shape[0]
    extra = r.extra.groups(count) if r.extra else 0
    checked_split(c.update, count + extra, r.samples_per_prompt, c.losses, c.joined_groups)
    constrain = row_constraint(c.mesh)
    samples = r.samples_per_prompt - r.demonstration_in_group
    with_greedy = "baseline_rewards" in c.wanted
    temperature = jnp.full(samples + with_greedy, r.temperature).at[samples:].set(0.0)
    sample = partial(
        generate,
        c.model,
        state.params,
        key=jax.random.fold_in(state.key, KeyUse.ROLLOUT),
        step=state.step,
        max_completion_tokens=r.max_completion_tokens,
        eos_ids=r.eos_ids,
        pad_id=r.pad_id,
        record_router=r.replay_router,
        constrain=constrain,
    )
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
    return constrain(greedy_last(rows, samples) if with_greedy else rows)


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
    return row_constraint(c.mesh)(replace(experience, reward_components=components))


def credit(c: Composition, state: TrainState, experience: Experience) -> tuple[Experience, dict[str, Any]]:
    """Reward components -> rewards -> advantages and whatever else the credit list fills in."""
    experience = with_rewards(experience, c.rewards)
    if "baseline_rewards" in c.wanted:
        experience = with_baseline(experience, c.rollout.samples_per_prompt)
    # One forward function: the sampler's numbers are the trainer's.
    experience = _viewed(c, state, experience, own_samples=c.rollout.extra is None, rows_are_groups=True)
    by_vocabulary = provide.over_vocabulary(
        c.model, state.params, experience, c.credit, temperature=c.rollout.temperature
    )
    return apply_credit(c.credit, experience, state.memory, state.step, by_vocabulary)


def _viewed(
    c: Composition, state: TrainState, rows: Experience, *, own_samples: bool, rows_are_groups: bool = False
) -> Experience:
    """Rows with everything that is wanted of policy, reference and critics before the update."""
    temperature = c.rollout.temperature
    rows = provide.policy_view(c.model, state.params, rows, c.wanted, temperature=temperature, own_samples=own_samples)
    if "reference_logprobs" in c.wanted:
        # Only groups that were sampled in this step are known to be of one prompt each.
        samples = c.rollout.samples_per_prompt if rows_are_groups else 1
        known = provide.reference_logprobs(
            c.model,
            reference_policy(c.model, state),
            rows,
            temperature=temperature,
            samples_per_prompt=samples,
            rows_at_once=c.update.sequences_per_microbatch,
        )
        rows = replace(rows, reference_logprobs=known)
    return provide.critic_view(c.model, state.params, state.critics, rows, c.wanted)


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
    return (row_constraint(c.mesh)(experience) if parts else experience), store


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
    )
    state, metrics = update(state, experience, factors)
    for term, factor in zip(c.losses, factors, strict=True):
        if term.coefficient_changes:
            metrics[f"coefficient/{term.name}"] = factor
    if c.critic is not None:
        state = replace(state, critics={name: moved_target(one, c.critic) for name, one in state.critics.items()})
    return state, metrics


def sample_and_score(c: Composition, state: TrainState, prompts: Prompts) -> Experience:
    """The first half of a step: what comes before rewards on the host."""
    return score(c, collect(c, state, prompts))


def view_and_score(c: Composition, state: TrainState, rows: Experience) -> Experience:
    """The same for rows that an engine has sampled."""
    return score(c, with_policy_view(c, state, row_constraint(c.mesh)(rows)))


def credit_and_learn(
    c: Composition, state: TrainState, experience: Experience, stored: Experience | None = None
) -> tuple[TrainState, dict[str, Array], Experience]:
    """The second half of a step: what comes after rewards on the host."""
    sampled = experience.weight
    experience, memory = credit(c, state, experience)
    metrics = experience_metrics(experience, sampled[: experience.weight.shape[0]])
    if c.external is not None:
        metrics |= engine_metrics(experience)
    batch, store = join(c, state, experience, stored)
    if c.update.alignment_every_steps:
        metrics["alignment"] = measured_alignment(c, state, batch)
    factors, memory = coefficients(c, experience, metrics, memory, state.step)
    if (held := memory.get(EXTRA_TEMPERATURE)) is not None:
        metrics["extra_temperature"] = held["temperature"]
        memory[EXTRA_TEMPERATURE] = next_temperature(cast(Any, c.rollout.extra).temperature, held, experience)
    state, learned = learn(c, state, batch, factors)
    state = replace(state, memory=memory, replay=store)
    return constrain_replicated(state, c.mesh), metrics | learned, experience


def whole_step(c: Composition, state: TrainState, prompts: Prompts, stored: Experience | None = None):
    """collect, score, credit, learn, in one program."""
    return credit_and_learn(c, state, sample_and_score(c, state, prompts), stored)


@dataclass(frozen=True)
class TrainStep:
    """A step that was checked and composed. Calling it: (state, prompts, items=None, stored=None) -> (state, metrics).

    Attributes:
      init: (key, params=None) -> TrainState.
      run: (state, prompts, items, stored) -> (state, metrics, experience).
      programs: the jitted functions that a step runs, in order; one when every reward is traceable.
      composition: what it was composed of.
    """

    init: Callable[..., TrainState]
    run: Callable[..., tuple[TrainState, dict[str, Array], Experience]]
    programs: tuple[Callable, ...]
    composition: Composition

    def __call__(
        self,
        state: TrainState,
        prompts: Prompts,
        items: Sequence[dict] | None = None,
        stored: Experience | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step. The given state is donated: use the returned one.

        `items` is needed by host rewards only, `stored` by a step that was composed for stored rows.
        """
        state, metrics, _ = self.run(state, prompts, items, stored)
        return state, metrics


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    rollout: Rollout,
    rewards: Sequence[RewardTerm | Callable],
    credit: Sequence[CreditTerm | tuple[str, Callable]],
    losses: Sequence[LossTerm | Callable | tuple[Callable, Any]],
    update: Update | None = None,
    prompts_per_step: int | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    critic: Critic | None = None,
    stored: StoredRows | None = None,
    replay: Replay | None = None,
    external: External | None = None,
) -> TrainStep:
    """Compose a training step from pure functions; what they name is what it computes.

    Args:
      model: the policy.
      optimizer: an optax transformation.
      rollout: how completions are sampled.
      rewards: reward functions; the first is the verifier that `correct` reports.
      credit: (field, function) pairs, in order; at least one fills `advantages` for a loss that names it.
      losses: loss functions, or (function, coefficient) pairs.
      update: epochs, minibatches, microbatches, reference refresh.
      prompts_per_step: prompts in a batch, if known: sizes that do not divide are then found here already.
      decode: token ids -> text, for rewards that read text.
      mesh: devices to spread rows over; None leaves placement to jax.
      critic: how a value model is made, for functions that name one of its outputs.
      stored: rows that every call brings along, for losses on stored answers.
      replay: learning again from rows of earlier steps.
      external: an engine in another process that samples the completions.

    Returns:
      `TrainStep`.

    Raises:
      ValueError: when a function names what nothing provides, or a part contradicts another.
    """
    reward_terms = tuple(t if isinstance(t, RewardTerm) else RewardTerm(t, name=_name(t)) for t in rewards)
    credit_terms = tuple(t if isinstance(t, CreditTerm) else CreditTerm(*t, name=_name(t[1])) for t in credit)
    loss_terms = tuple(_loss_term(t) for t in losses)
    update = update or Update()
    for name, token in (*(("eos_ids", each) for each in rollout.eos_ids), ("pad_id", rollout.pad_id)):
        if not 0 <= token < model.vocabulary_size:
            raise ValueError(
                f"rollout.{name} is {getattr(rollout, name)}, but the model's symbols are 0 to "
                f"{model.vocabulary_size - 1}; take the id from the tokenizer that made the prompts"
            )
    for term in loss_terms:
        if not model.routed and (asked := sorted(set(ROUTER).intersection(signature(term.function).required))):
            raise ValueError(
                f"loss {term.name!r} names {asked[0]!r}, but the model is no mixture of experts; leave the loss out"
            )
    if rollout.replay_router:
        _check_router(model, rollout, stored=stored, replay=replay)
    joined = (stored.groups if stored else 0) + (replay.groups if replay else 0)
    if prompts_per_step is not None:
        extra = rollout.extra.groups(prompts_per_step) if rollout.extra else 0
        checked_split(update, prompts_per_step + extra, rollout.samples_per_prompt, loss_terms, joined)
    wanted = wanted_fields(
        reward_terms,
        credit_terms,
        loss_terms,
        samples_per_prompt=rollout.samples_per_prompt,
        decode=decode,
        with_critic=critic is not None,
        provided=(stored.provides if stored else frozenset())
        | ({"extra"} if rollout.extra else frozenset())
        | ({STALENESS} if external else frozenset()),
        replay=replay is not None,
    )
    if rollout.demonstration_in_group:
        wanted |= provide.FROM_DATA
    if update.alignment_every_steps and not (
        stored and "validation" in stored.provides and any(t.on_written for t in loss_terms)
    ):
        raise ValueError(
            f"training.alignment_every_steps is {update.alignment_every_steps}, but alignment compares a loss on "
            "written completions with the others; add section supervised and losses: stored_likelihood"
        )
    if model.trained is not None and update.reference_decay is not None:
        raise ValueError(
            f"training.reference_decay is {update.reference_decay}, but the policy has adapters, whose moving average "
            "is not that of the matrices they stand for; leave it out, or use training.refresh_reference_every"
        )
    if rollout.extra and "baseline_rewards" in wanted:
        raise ValueError(
            "rollout.extra is set and something names 'baseline_rewards'; a greedy baseline and groups at another "
            "temperature cannot be had in one step, so leave one of them out"
        )
    if external is not None:
        check_external(rollout, wanted)
    c = Composition(
        model,
        optimizer,
        rollout,
        reward_terms,
        credit_terms,
        loss_terms,
        update,
        wanted,
        mesh,
        critic=critic,
        stored=stored,
        replay=replay,
        external=external,
    )
    init = jax.jit(partial(initial_state, c))
    if external is not None:
        return _step_with_engine(c, init, external, decode)
    if not any(term.on_host for term in reward_terms):
        program = jax.jit(partial(whole_step, c), donate_argnums=0)
        return TrainStep(
            init, lambda state, prompts, items=None, stored=None: program(state, prompts, stored), (program,), c
        )
    programs = (jax.jit(partial(sample_and_score, c)), jax.jit(partial(credit_and_learn, c), donate_argnums=0))
    return TrainStep(init, partial(_run_with_host, programs, reward_terms, decode), programs, c)


def _step_with_engine(c: Composition, init: Callable, external: External, decode: Any) -> TrainStep:
    """A step that is sampled for, and then runs two programs; host rewards come between them where there are any."""
    programs = (jax.jit(partial(view_and_score, c)), jax.jit(partial(credit_and_learn, c), donate_argnums=0))
    collected = make_collect(c, external)
    both = (lambda state, prompts: programs[0](state, collected(state, prompts)), programs[1])
    if any(term.on_host for term in c.rewards):
        return TrainStep(init, partial(_run_with_host, both, c.rewards, decode), programs, c)

    def run(state, prompts, items=None, stored=None):
        return both[1](state, both[0](state, prompts), stored)

    return TrainStep(init, run, programs, c)


def _check_router(model: Model, rollout: Rollout, **others: Any) -> None:
    """Refuse rows whose experts nobody recorded."""
    if not model.routed:
        raise ValueError(
            "rollout.replay_router is true, but the model is no mixture of experts; leave it out, or set model.experts"
        )
    others["rollout.demonstration_in_group"] = rollout.demonstration_in_group
    if given := [name for name, value in others.items() if value]:
        raise ValueError(
            f"rollout.replay_router is true and {given[0]} brings rows that were not sampled in this step, for which "
            "no experts are recorded; leave one of them out"
        )


def _run_with_host(programs, reward_terms, decode, state, prompts, items=None, stored=None):
    """The same step in two programs, with the host rewards between them."""
    if items is None:
        raise ValueError(
            "this step has a reward that reads text: call step(state, prompts, items) with one dictionary "
            "a prompt (body, answer, ...)"
        )
    experience = programs[0](state, prompts)
    components = host_components(reward_terms, experience, items, decode)
    placement = experience.reward_components.sharding
    if isinstance(placement, NamedSharding):  # without a mesh, placing them by hand would compile both programs twice
        components = jax.device_put(components, placement)
    return programs[1](state, replace(experience, reward_components=components), stored)


def _name(function: Any) -> str:
    function = getattr(function, "func", function)
    if isinstance(function, Method):
        function = function.update
    return getattr(function, "__name__", type(function).__name__).lstrip("_")


def _loss_term(term: Any) -> LossTerm:
    if isinstance(term, LossTerm):
        return term
    function, coefficient = term if isinstance(term, tuple) and not callable(term) else (term, 1.0)
    return LossTerm(function, coefficient, _name(function))
