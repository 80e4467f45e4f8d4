"""The training step: collect, score, credit, learn.

    step = learn . credit . score . collect          state, metrics = step(state, prompts)

When every reward is traceable the step is one XLA program. When a reward reads text it is the same composition
with the host call between two jitted halves; the caller writes the same thing in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, KeyUse, Method, Prompts, Source, TrainState
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import RULES, Rules, constrain_rows, decoding, laid_out, layout
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.generate import Prefixes, generate
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.rollout.host_turns import HostTurns, host_turns
from jaxrl_llm.rollout.rounds import Adaptive, Budget, Refill
from jaxrl_llm.rollout.turns import TURN_FIELDS, generate_turns
from jaxrl_llm.rollout.weights import weights_for_decoding
from jaxrl_llm.training import provide
from jaxrl_llm.training.checks import wanted_fields
from jaxrl_llm.training.conversations import AnyEnvironment, check_conversations, run_with_host_environment
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
from jaxrl_llm.training.host_rewards import rewarded_on_host
from jaxrl_llm.training.learn import ROUTER, LossTerm, Update, alignment, checked_split, make_learn
from jaxrl_llm.training.metrics import experience_metrics
from jaxrl_llm.training.placement import (
    OFFLOADED,
    in_device_memory,
    parameter_shardings,
    placed_state,
)
from jaxrl_llm.training.rounds import (
    POOL_FIELDS,
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
    Extra,
    concatenated,
    greedy_last,
    initial_temperature,
    next_temperature,
    with_baseline,
    with_demonstrations,
)
from jaxrl_llm.training.score import RewardTerm, traceable_components, with_rewards
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
      slots: completions that are decoded at a time; None decodes all side by side.
      rounds: sampling in several rounds, or in groups of different sizes; see `rounds`.
      truncation: top-k, with top-p and min-p within it, of what is sampled. The trainer then computes over the tokens
        that each one could have been, too; None samples from the whole vocabulary.
      off_policy_steps: 1 samples a batch with the policy before the last update (one-step off-policy), 0 with the
        newest.
      environment: what answers the turns of conversations; None where one completion is all.
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
    slots: int | None = None
    rounds: Refill | Adaptive | Budget | None = None
    truncation: Controls | None = None
    off_policy_steps: int = 0
    environment: AnyEnvironment | None = None

    def __post_init__(self):
        if self.truncation is not None and self.truncation.top_k is None:
            raise ValueError(
                "rollout.top_p or rollout.min_p is set without rollout.top_k; training keeps the tokens that each one "
                "was drawn from, so bound their number (for example top_k: 64)"
            )
        if self.truncation is not None and (self.demonstration_in_group or self.prefixes):
            name = "demonstration_in_group" if self.demonstration_in_group else "prefixes"
            raise ValueError(
                f"rollout.top_k is set together with rollout.{name}, whose tokens nobody drew; leave one of them out"
            )
        if self.off_policy_steps not in (0, 1):
            raise ValueError(f"rollout.off_policy_steps is {self.off_policy_steps}; it must be 0 or 1")
        if self.rounds is not None:
            self._check_rounds(self.rounds)
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

    def _check_rounds(self, rounds: Refill | Adaptive | Budget) -> None:
        name = f"rollout.{type(rounds).__name__.lower()}"
        others = {
            "rollout.demonstration_in_group": self.demonstration_in_group,
            "rollout.prefixes": bool(self.prefixes),
            "rollout.extra": self.extra is not None,
            "rollout.replay_router": self.replay_router,
            "rollout.off_policy_steps": bool(self.off_policy_steps),
        }
        if given := [other for other, value in others.items() if value]:
            raise ValueError(
                f"{name} and {given[0]} are both set, but only plain samples are drawn in rounds; drop one"
            )
        if isinstance(rounds, Adaptive) and rounds.max_rounds * rounds.samples_per_round < self.samples_per_prompt:
            raise ValueError(
                f"rollout.samples_per_prompt is {self.samples_per_prompt}, but {name} draws at most "
                f"{rounds.max_rounds} x {rounds.samples_per_round} samples of a prompt; keep fewer or draw more"
            )
        if isinstance(rounds, Budget) and not rounds.least <= self.samples_per_prompt <= rounds.most:
            raise ValueError(
                f"rollout.samples_per_prompt is {self.samples_per_prompt}, but {name} has least {rounds.least} and "
                f"most {rounds.most}; it is the mean and must lie between them"
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
      mesh: devices that the step runs on, or None.
      rules: from the names of axes to those of the mesh.
      gather_for_rollout: sampling reads weights that are gathered once, not for each token.
      offload: what is kept in the host's memory between its uses, keys of `OFFLOADED`.
      placed: a sharding for each array of the state; None without a mesh.
      critic: how value models and their like are made.
      stored: rows that every step is handed beside the prompts.
      replay: learning again from rows of earlier steps.
      external: an engine that samples in the place of `collect`.
      turns: programs of conversations whose environment is in Python, in the place of `collect` too.
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
    rules: Rules = field(default_factory=lambda: RULES)
    gather_for_rollout: bool = True
    offload: frozenset[str] = frozenset()
    placed: Any = None
    turns: HostTurns | None = None

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
    def equal_groups(self) -> bool:
        """Whether each `samples_per_prompt` rows that were sampled one after the other are those of one prompt."""
        return not isinstance(self.rollout.rounds, Budget)

    @property
    def keeps_record(self) -> bool:
        """Whether the sampler's own record stands for the log-probabilities of the policy before the update.

        Samples of the policy before it are taken for its own too, as PPO does, unless something tells the two apart.
        """
        r, functions = self.rollout, [t.function for t in (*self.credit, *self.losses)]
        exact = r.extra is None and getattr(self.model.config, "cache_dtype", "compute") == "compute"
        return exact and not (r.off_policy_steps and any("behaviour_logprobs" in names(f) for f in functions))

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
    state = replace(state, **{f: jax.device_put(getattr(state, f), getattr(c.placed, f)) for f in _offloaded(c)})
    pinned = [f.name for f in fields(state) if f.name not in _offloaded(c)]
    constrain = partial(jax.tree.map, jax.lax.with_sharding_constraint)
    return replace(state, **{f: constrain(getattr(state, f), getattr(c.placed, f)) for f in pinned})


def _offloaded(c: Composition) -> list[str]:
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


@dataclass(frozen=True)
class TrainStep:
    """A step that was checked and composed. Calling it: (state, prompts, items=None, stored=None) -> (state, metrics).

    Attributes:
      init: (key, params=None) -> TrainState.
      run: (state, prompts, items, stored) -> (state, metrics, experience). One step off-policy, the prompts are those
        of the next step and the items those of this one.
      programs: the jitted functions that a step runs, in order; one when every reward is traceable.
      composition: what it was composed of.
      prime: (state, prompts) -> a state that holds the batch of its first step; None where a step samples its own.
    """

    init: Callable[..., TrainState]
    run: Callable[..., tuple[TrainState, dict[str, Array], Experience]]
    programs: tuple[Callable, ...]
    composition: Composition
    prime: Callable[[TrainState, Prompts], TrainState] | None = None

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
    encode: Callable[[str], list[int]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = RULES,
    gather_for_rollout: bool = True,
    offload: Sequence[str] = (),
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
      decode: token ids -> text, for rewards that read text and environments in Python.
      encode: text -> token ids, for environments in Python.
      mesh: devices to run on; None leaves placement to jax.
      rules: from the names of axes to those of the mesh.
      gather_for_rollout: with parameters that are sharded over `fsdp`, gather them once a rollout; else once a token.
      offload: what to keep in the host's memory between its uses: "optimizer", "reference". Needs a mesh.
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
        | ({STALENESS} if external else frozenset())
        | (POOL_FIELDS if isinstance(rollout.rounds, Adaptive) else frozenset()),
        replay=replay is not None,
        sampled=TURN_FIELDS if rollout.environment is not None else frozenset(),
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
    if rollout.environment is not None:
        names_of = ("demonstration_in_group", "prefixes", "extra", "replay_router", "slots", "rounds")
        settings = {name: getattr(rollout, name) for name in names_of}
        others = {"replay": replay, "rollout.engine": external}
        check_conversations(rollout.environment, settings, wanted, others)
    if external is not None:
        check_external(rollout, wanted)
        if rollout.off_policy_steps:
            raise ValueError(
                "rollout.off_policy_steps is 1 and rollout.engine is set; an engine's policy is as old as "
                "rollout.engine.reload_every_steps says, so leave off_policy_steps out"
            )
    if rollout.truncation is not None:
        _check_truncation(credit_terms, loss_terms, stored=stored, replay=replay, engine=external)
    if rollout.rounds is not None:
        _check_rounds(rollout.rounds, wanted, update, loss_terms, stored=stored, replay=replay, engine=external)
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
        rules=rules,
        gather_for_rollout=gather_for_rollout,
        offload=frozenset(offload),
        turns=_host_turns(model, rollout, decode, encode),
    )
    _check_offload(c)
    init = jax.jit(laid_out(partial(initial_state, c), mesh, rules))
    if mesh is not None:
        c = replace(
            c, placed=placed_state(model, jax.eval_shape(init, jax.random.key(0)), mesh, rules, offload=offload)
        )
        init = _initial_on_mesh(c)
    if external is not None:
        return _step_with_engine(c, init, external, decode)
    if c.turns is not None:
        halves = (_looking(c, _score_talks), _learning(c, credit_and_learn))
        return TrainStep(init, run_with_host_environment(c.turns, halves, reward_terms, decode), halves, c)
    on_host, behind = any(term.on_host for term in reward_terms), bool(rollout.off_policy_steps)
    prime = jax.jit(laid_out(partial(primed, c), mesh, rules), donate_argnums=0) if behind else None
    if not on_host:
        program = _learning(c, step_behind if behind else whole_step)
        return TrainStep(
            init, lambda state, prompts, items=None, stored=None: program(state, prompts, stored), (program,), c, prime
        )
    if behind:
        return _step_behind_with_host(c, init, prime, decode)
    programs = (_looking(c, sample_and_score), _learning(c, credit_and_learn))
    if isinstance(rollout.rounds, Refill | Adaptive):
        return TrainStep(init, _step_in_rounds(c, programs[1], decode), programs, c)
    return TrainStep(init, partial(_run_with_host, programs, reward_terms, decode), programs, c)


def _step_behind_with_host(c: Composition, init: Callable, prime: Any, decode: Any) -> TrainStep:
    """While the device samples the next batch, the host rewards the one that is there."""
    sample, learned = _looking(c, sample_ahead), _learning(c, credit_and_learn)

    def run(state, prompts, items=None, stored=None):
        ahead = sample(state, prompts)
        rows = rewarded_on_host(c.rewards, cast(Experience, state.ahead), _required(items), decode)
        state, metrics, experience = learned(replace(state, ahead=None), rows, stored)
        return replace(state, ahead=ahead), metrics, experience

    return TrainStep(init, run, (sample, learned), c, prime)


def _step_in_rounds(c: Composition, learned: Callable, decode: Any) -> Callable:
    """A step whose rounds wait for rewards on the host."""

    def start(c, state, prompts):
        return first_carry(c, cast(Loop, rounds_of(c, prompts)), state, prompts)

    def sample(c, state, prompts, carry):
        loop = cast(Loop, rounds_of(c, prompts))
        return sample_round(c, state, prompts, loop.request(carry)), loop.first_item(carry)

    def merge(c, prompts, carry, rows):
        loop = cast(Loop, rounds_of(c, prompts))
        carry = loop.merge(carry, with_rewards(rows, c.rewards))
        return carry, loop.unfinished(carry), rounds_result(loop, carry)

    begin, draw, keep = (_looking(c, function) for function in (start, sample, merge))

    def run(state, prompts, items=None, stored=None):
        items = _required(items)
        in_round = len(items) // (c.rollout.rounds.max_rounds if isinstance(c.rollout.rounds, Refill) else 1)
        carry, more, rows = begin(state, prompts), True, None
        while more:
            drawn, first = draw(state, prompts, carry)
            drawn = rewarded_on_host(c.rewards, drawn, items[int(first) :][:in_round], decode)
            carry, more, rows = keep(prompts, carry, drawn)
        return learned(state, rows, stored)

    return run


def _required(items: Sequence[dict] | None) -> Sequence[dict]:
    if items is None:
        raise ValueError(
            "this step has a reward that reads text: call step(state, prompts, items) with one dictionary "
            "a prompt (body, answer, ...)"
        )
    return items


def _step_with_engine(c: Composition, init: Callable, external: External, decode: Any) -> TrainStep:
    """A step that is sampled for, and then runs two programs; host rewards come between them where there are any."""
    programs = (_looking(c, view_and_score), _learning(c, credit_and_learn))
    collected = make_collect(c, external)
    both = (lambda state, prompts: programs[0](state, collected(state, prompts)), programs[1])
    if any(term.on_host for term in c.rewards):
        return TrainStep(init, partial(_run_with_host, both, c.rewards, decode), programs, c)

    def run(state, prompts, items=None, stored=None):
        return both[1](state, both[0](state, prompts), stored)

    return TrainStep(init, run, programs, c)


def _check_truncation(credit: Sequence[CreditTerm], losses: Sequence[LossTerm], **others: Any) -> None:
    """Refuse what has no place where only some tokens can be drawn."""
    whole = [t.name for t in credit if t.over_vocabulary]
    whole += [t.name for t in losses if "over_vocabulary" in names(t.function)]
    given = [name for name, value in others.items() if value is not None]
    if whole or given:
        what = f"{whole[0]!r} reads the whole vocabulary" if whole else f"{given[0]} rows were drawn otherwise"
        raise ValueError(f"rollout.top_k is set, but {what}; leave one of them out")


def _host_turns(model: Model, rollout: Rollout, decode: Any, encode: Any) -> HostTurns | None:
    """Programs for an environment in Python; None without one."""
    if not isinstance(rollout.environment, HostEnvironment):
        return None
    if decode is None or encode is None:
        raise ValueError("an environment in Python reads and writes text, so make_train_step needs decode= and encode=")
    return host_turns(
        model,
        rollout.environment,
        samples_per_prompt=rollout.samples_per_prompt,
        max_completion_tokens=rollout.max_completion_tokens,
        eos_ids=rollout.eos_ids,
        pad_id=rollout.pad_id,
        encode=encode,
        decode=decode,
        temperature=rollout.temperature,
        constrain=constrain_rows,
    )


def _check_rounds(
    rounds: Refill | Adaptive | Budget,
    wanted: frozenset[str],
    update: Update,
    losses: Sequence[LossTerm],
    **others: Any,
) -> None:
    """Refuse what rounds cannot be had with."""
    name = f"rollout.{type(rounds).__name__.lower()}"
    if "baseline_rewards" in wanted or others["engine"] is not None:
        what = "rollout.engine" if others["engine"] is not None else "a greedy baseline ('baseline_rewards')"
        raise ValueError(f"{name} is set together with {what}, which samples once; leave one of them out")
    if not isinstance(rounds, Budget):
        return
    if given := [other for other in ("stored", "replay") if others[other] is not None]:
        raise ValueError(f"{name} makes groups of different sizes, but {given[0]} rows come in equal ones; drop one")
    whole = [term.name for term in losses if "group" in names(term.function)]
    if whole and (update.minibatches_per_epoch > 1 or update.sequences_per_microbatch is not None):
        raise ValueError(
            f"{name} makes groups of different sizes, and loss {whole[0]!r} compares the samples of a prompt: leave "
            "training.sequences_per_microbatch out and set training.minibatches_per_epoch to 1"
        )


def _score_talks(c: Composition, state: TrainState, rows: Experience) -> Experience:
    return score(c, constrain_rows(rows))


def _looking(c: Composition, function: Callable) -> Callable:
    """A compiled stage, traced under the table of the mesh."""
    return jax.jit(laid_out(partial(function, c), c.mesh, c.rules))


def _learning(c: Composition, function: Callable) -> Callable:
    """A compiled stage that gives (state, numbers, rows). The state it is given is used up, and lies where it lay."""
    # Numbers are on every device, and rows are where the program has put them.
    returned = None if c.mesh is None else (c.placed, NamedSharding(c.mesh, P()), None)
    return jax.jit(laid_out(partial(function, c), c.mesh, c.rules), donate_argnums=0, out_shardings=returned)


def _initial_on_mesh(c: Composition) -> Callable[..., TrainState]:
    """`initial_state`, every array made where it will lie: no device ever holds the whole of it."""
    assert c.mesh is not None
    whole = {name: getattr(c.placed, name) for name in _offloaded(c)}
    on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), c.placed)
    program = jax.jit(laid_out(partial(initial_state, c), c.mesh, c.rules), out_shardings=on_device)
    lies = parameter_shardings(c.model, c.mesh, c.rules)

    def init(key: Array, params: PyTree | None = None) -> TrainState:
        state = program(key, None if params is None else jax.device_put(params, lies))
        return replace(state, **{name: jax.device_put(getattr(state, name), there) for name, there in whole.items()})

    return init


def _check_offload(c: Composition) -> None:
    if unknown := sorted(c.offload - OFFLOADED.keys()):
        raise ValueError(f"training.offload names {unknown[0]!r}; it can name {', '.join(OFFLOADED)}")
    if c.offload and c.mesh is None:
        raise ValueError(
            f"offload is {sorted(c.offload)} without a mesh; pass mesh=make_mesh(), which may be of one device"
        )
    if "reference" in c.offload and not c.copies_reference:
        raise ValueError(
            "training.offload names reference, but the step keeps no copy of a reference policy; leave it out"
        )


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
    items = _required(items)
    experience = rewarded_on_host(reward_terms, programs[0](state, prompts), items, decode)
    return programs[1](state, experience, stored)


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
