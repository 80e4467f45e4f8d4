"""Learn: experience -> new parameters, over epochs, minibatches and microbatches.

Losses are sums and counts. The counts do not depend on the parameters, so those of a whole minibatch are known
before the first microbatch is differentiated, and the gradient is the same however the minibatch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, KeyUse, Loss, Method, Source, TrainState
from jaxrl_llm.losses import gradient_alignment
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import constrain_rows
from jaxrl_llm.parallel.shardings import constrained_like
from jaxrl_llm.rollout.hidden_states import observed_hidden
from jaxrl_llm.training import anchors
from jaxrl_llm.training.critics import CURRENT, HEADS, Critic, critic_outputs, critics_named, named
from jaxrl_llm.training.trainable import frozen_part, reference_policy, trainable_part, whole
from jaxrl_llm.training.wiring import call, fields_of, names, signature

# Names that a loss may ask for beyond the fields of Experience.
LEARNER_NAMES = frozenset(
    {"logprobs", "entropy", "over_vocabulary", "router_probabilities", "router_choices", *CURRENT}
)

# What the routers of a mixture of experts did, for each token of prompt and completion.
ROUTER = ("router_choices", "router_probabilities")

POLICY = "policy"


@dataclass(frozen=True)
class LossTerm:
    """One loss of a recipe.

    Attributes:
      function: returns a `Loss`.
      coefficient: a number, or a function (or `Method`) of experience fields and metrics that returns one.
      name: for metrics and messages.
    """

    function: Callable[..., Loss]
    coefficient: Any = 1.0
    name: str = ""

    @property
    def coefficient_changes(self) -> bool:
        """Whether the coefficient is computed anew in each step."""
        return callable(self.coefficient) or isinstance(self.coefficient, Method)

    @property
    def on_written(self) -> bool:
        """Whether it is a loss on written completions, which it finds by their source."""
        read = names(self.function)
        return "source" in read and "mask" not in read

    @property
    def memory_name(self) -> str:
        """Key of the coefficient's memory in `TrainState.memory`."""
        return f"coefficient:{self.name}"


@dataclass(frozen=True)
class Update:
    """How one batch of experience becomes parameter updates.

    Attributes:
      epochs_per_batch: passes over the batch.
      minibatches_per_epoch: optimiser updates a pass; each takes whole groups.
      sequences_per_microbatch: rows differentiated at once; None takes a whole minibatch.
      refresh_reference_every: steps between copies of the policy into the reference; 0 keeps it frozen.
      refresh_reference_at: steps after which the policy is copied into the reference, beside those.
      reference_decay: the reference follows the policy as an exponential moving average that keeps this share at each
        step; None leaves it where it is.
      snapshot_reference: for a policy with adapters: the reference is the policy as training finds it, kept as a copy
        of its adapters. Otherwise it is the base without them, unless it is refreshed.
      freeze_policy_steps: first steps in which only critics learn.
      alignment_every_steps: steps between two measurements of `alignment`; 0 never measures it.
      alignment_learning_rate: the step size that it is measured for.
    """

    epochs_per_batch: int = 1
    minibatches_per_epoch: int = 1
    sequences_per_microbatch: int | None = None
    refresh_reference_every: int = 0
    refresh_reference_at: tuple[int, ...] = ()
    reference_decay: float | None = None
    snapshot_reference: bool = False
    freeze_policy_steps: int = 0
    alignment_every_steps: int = 0
    alignment_learning_rate: float = 1e-4

    @property
    def refreshes_reference(self) -> bool:
        """Whether the policy is copied into the reference at some step."""
        return bool(self.refresh_reference_every or self.refresh_reference_at)


def checked_split(update: Update, prompts: int, samples: int, losses: Sequence[LossTerm], joined: int = 0) -> int:
    """Microbatches in a minibatch.

    Args:
      update: how the batch is to be cut.
      prompts: groups that were sampled.
      samples: rows of a group.
      losses: those that compare the rows of a group want whole groups.
      joined: groups of stored rows that learn beside them.

    Raises:
      ValueError: when the batch does not divide as `update` asks.
    """
    for count, name in ((prompts, "training.prompts_per_step"), (joined, "the number of groups of stored rows")):
        if count % update.minibatches_per_epoch:
            raise ValueError(
                f"training.minibatches_per_epoch is {update.minibatches_per_epoch}, which does not divide "
                f"{name} {count}; minibatches hold whole groups, so choose a divisor of {count}"
            )
    rows = (prompts + joined) * samples // update.minibatches_per_epoch
    size = update.sequences_per_microbatch or rows
    if rows % size:
        stored = f" and {joined * samples} stored rows" if joined else ""
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, which does not divide the {rows} sequences of a minibatch "
            f"({prompts} prompts x {samples} samples{stored} / {update.minibatches_per_epoch} minibatches); "
            "choose a divisor"
        )
    whole = [term.name for term in losses if "group" in names(term.function)]
    if whole and size % samples:
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, but loss {whole[0]!r} compares the samples of a prompt, so "
            f"a microbatch must hold whole groups: choose a multiple of rollout.samples_per_prompt {samples}"
        )
    return rows // size


def minibatch_rows(key: Array, update: Update, groups: Sequence[int], samples: int) -> Array:
    """Row numbers [updates, rows]: each epoch visits the groups in a new order, cut into minibatches.

    Args:
      key: random key of this step.
      update: how many epochs and minibatches.
      groups: sizes of the parts of a batch, such as sampled and stored groups; every minibatch has its share of each.
      samples: rows of a group.
    """
    epochs, cuts = update.epochs_per_batch, update.minibatches_per_epoch
    parts, first = [], 0
    for index, count in enumerate(groups):
        if cuts == 1:
            order = jnp.tile(jnp.arange(count), (epochs, 1))
        else:
            keys = jax.random.split(jax.random.fold_in(key, index) if index else key, epochs)
            order = jax.vmap(lambda k: jax.random.permutation(k, count))(keys)  # noqa: B023
        parts.append((first + order).reshape(epochs * cuts, -1))
        first += count
    rows = jnp.concatenate(parts, axis=1)[..., None] * samples + jnp.arange(samples)
    return rows.reshape(epochs * cuts, -1)


class Objective(NamedTuple):
    """The weighted sum of losses as functions of parameters and rows.

    Attributes:
      critics: names of the critics that the losses ask for.
      denominators: rows -> one count a loss; they do not depend on parameters.
      value: (trained, frozen, reference_params, rows, counts, coefficients) -> (scalar, what to log); `trained` holds
        what learns of the policy and of the critics by name, `frozen` the rest of the policy's parameters.
    """

    critics: tuple[str, ...]
    denominators: Callable[[Experience], list[Array]]
    value: Callable[..., tuple[Array, Any]]


def make_objective(
    model: Model, losses: Sequence[LossTerm], *, temperature: float, samples_per_prompt: int = 1
) -> Objective:
    """Compose losses. Only what they name is computed.

    A loss that names `entropy` or carries an `over_vocabulary` functional has it evaluated in the same chunked pass as
    the log-probabilities; one that names `values` has the value model evaluated. Each `samples_per_prompt` rows that
    follow one another are of one prompt.
    """
    wanted = frozenset().union(*(signature(term.function).required for term in losses))
    with_entropy = "entropy" in wanted
    critics = critics_named(wanted & CURRENT.keys())
    functionals = {t.name: t.function.over_vocabulary for t in losses if "over_vocabulary" in names(t.function)}

    with_router = bool(wanted.intersection(ROUTER))

    def hidden_of(params: PyTree, rows: Experience, routes: Array | None = None, names: tuple[str, ...] = ()):
        return observed_hidden(
            model,
            params,
            rows.prompt_tokens,
            rows.prompt_length,
            rows.tokens,
            rows.length,
            router_choices=routes,
            samples_per_prompt=samples_per_prompt,
            names=names,
        )

    def terms(rows: Experience, learner: dict[str, Any], over_vocabulary: Mapping[str, Any]) -> list[Loss]:
        provided = fields_of(rows) | learner
        provided["mask"] = rows.mask * rows.weight[:, None]
        return [call(term.function, provided | {"over_vocabulary": over_vocabulary.get(term.name)}) for term in losses]

    def denominators(rows: Experience) -> list[Array]:
        nothing = jnp.zeros(rows.tokens.shape, jnp.float32)
        outputs = {(name, False): jnp.zeros((*nothing.shape, HEADS[name])) for name in critics}
        placeholders: dict[str, Any] = {"logprobs": nothing} | named(CURRENT, wanted, outputs, rows)
        placeholders |= {"entropy": nothing} if with_entropy else {}
        if with_router:
            shape = (rows.tokens.shape[0], rows.prompt_tokens.shape[1] + rows.tokens.shape[1], 1, 1)
            placeholders |= {"router_probabilities": jnp.zeros(shape), "router_choices": jnp.zeros(shape, jnp.int32)}
        counts = [loss.denominator for loss in terms(rows, placeholders, dict.fromkeys(functionals, nothing))]
        return [jnp.float32(1.0) if d is None else jnp.where(d == 0, 1.0, d) for d in counts]

    def value(trained, frozen, reference_params, rows: Experience, counts, coefficients):
        params = whole(model, trained[POLICY], frozen)
        reference = None
        if functionals:
            reference = (reference_params, jax.lax.stop_gradient(hidden_of(reference_params, rows)[0]))
        # The experts that sampled a token are those that learn from it.
        hidden, observed = hidden_of(params, rows, rows.router_choices, ROUTER if with_router else ())
        statistics = token_statistics(
            model,
            params,
            hidden,
            rows.tokens,
            temperature=temperature,
            entropy=with_entropy,
            over_vocabulary=tuple(functionals.values()),
            reference=reference,
            support=rows.support,
        )
        outputs = {(name, False): critic_outputs(model, trained[name], rows, hidden, frozen) for name in critics}
        learner: dict[str, Any] = {"logprobs": statistics.logprobs} | named(CURRENT, wanted, outputs, rows)
        learner |= observed
        if with_entropy:
            learner["entropy"] = statistics.entropy
        parts = terms(rows, learner, dict(zip(functionals, statistics.over_vocabulary, strict=True)))
        values = [loss.numerator / count for loss, count in zip(parts, counts, strict=True)]
        total = sum((c * v for c, v in zip(coefficients, values, strict=True)), jnp.float32(0.0))
        sums = {f"loss/{term.name}": (value, 0.0) for term, value in zip(losses, values, strict=True)}
        sums["loss"] = (total, 0.0)
        for term, loss in zip(losses, parts, strict=True):
            sums |= {f"{name}/{term.name}": pair for name, pair in loss.metrics.items()}
        return jnp.asarray(total), (sums, _drift(statistics.logprobs, rows))

    return Objective(critics, denominators, value)


def make_learn(
    model: Model,
    optimizer: optax.GradientTransformation,
    losses: Sequence[LossTerm],
    update: Update,
    *,
    temperature: float,
    samples_per_prompt: int,
    critic: Critic | None = None,
    joined: int = 0,
    equal_groups: bool = True,
) -> Callable[[TrainState, Experience, Sequence[Array]], tuple[TrainState, dict[str, Array]]]:
    """Build learn(state, experience, coefficients) -> (state, metrics).

    Args:
      model: the policy.
      optimizer: of the policy.
      losses: what is minimised, weighted by the coefficients.
      update: epochs, minibatches, microbatches, what becomes of the reference.
      temperature: the one that the rollout sampled with.
      samples_per_prompt: rows of a group.
      critic: how critics are made, for losses that name one; each is trained by its own optimiser.
      joined: groups at the end of the experience that were not sampled in this step.
      equal_groups: whether each `samples_per_prompt` rows are those of one prompt.
    """
    # Stored rows need not come in groups of one prompt, and a microbatch may cut a group.
    whole_groups = (
        equal_groups
        and not joined
        and (update.sequences_per_microbatch or samples_per_prompt) % samples_per_prompt == 0
    )
    shared = samples_per_prompt if whole_groups else 1
    objective = make_objective(model, losses, temperature=temperature, samples_per_prompt=shared)
    critics = objective.critics
    optimizers = {POLICY: optimizer} | (dict.fromkeys(critics, critic.optimizer) if critic else {})
    specs = None if model.specs is None else trainable_part(model, model.specs)

    def like_parameters(grads):
        """Gradients where their parameters lie, so that each device adds up its own part alone."""

        def pinned(name, tree):
            if name == POLICY:
                return constrained_like(specs, tree)
            backbone = {"backbone": constrained_like(specs, tree["backbone"])} if "backbone" in tree else {}
            return tree | backbone

        return {name: pinned(name, tree) for name, tree in grads.items()}

    def gradient(trained, frozen, reference_params, rows: Experience, coefficients):
        counts = objective.denominators(rows)
        size = update.sequences_per_microbatch or rows.tokens.shape[0]
        pieces = rows.tokens.shape[0] // size
        slope = jax.grad(objective.value, has_aux=True)

        def differentiate(*arguments):
            grads, aux = slope(*arguments)
            return like_parameters(grads), aux

        if pieces == 1:
            return differentiate(trained, frozen, reference_params, rows, counts, coefficients)
        split = constrain_rows(jax.tree.map(lambda x: x.reshape(pieces, size, *x.shape[1:]), rows), None)

        def accumulate(carry, piece):
            grads, (sums, (peaks, drift)) = differentiate(
                trained, frozen, reference_params, piece, counts, coefficients
            )
            old_grads, (old_sums, (old_peaks, old_drift)) = carry
            add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
            peaks = jax.tree.map(jnp.maximum, old_peaks, peaks)
            return (add(old_grads, grads), (add(old_sums, sums), (peaks, add(old_drift, drift)))), None

        one = jax.tree.map(lambda x: x[0], split)
        first = jax.eval_shape(differentiate, trained, frozen, reference_params, one, counts, coefficients)
        grads, aux = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        return jax.lax.scan(accumulate, (like_parameters(grads), aux), split)[0]

    @jax.named_scope("update")
    def learn(state: TrainState, experience: Experience, coefficients: Sequence[Array]):
        groups = experience.tokens.shape[0] // samples_per_prompt
        key = jax.random.fold_in(jax.random.fold_in(state.key, KeyUse.MINIBATCHES), state.step)
        order = minibatch_rows(key, update, [groups - joined, joined], samples_per_prompt)
        waits = state.step < update.freeze_policy_steps if update.freeze_policy_steps else None
        kept, reference = frozen_part(model, state.params), reference_policy(model, state)

        def one_update(carry, rows):
            trained, optimizer_states = carry
            batch = experience if order.shape[0] == 1 else constrain_rows(jax.tree.map(lambda x: x[rows], experience))
            grads, (sums, (peaks, drift)) = gradient(trained, kept, reference, batch, coefficients)
            after, states_after = {}, {}
            for name, one in optimizers.items():
                deltas, states_after[name] = one.update(grads[name], optimizer_states[name], trained[name])
                after[name] = optax.apply_updates(trained[name], deltas)
                # The norm after the update: what a checkpoint would hold is looked at before it is written.
                label = "" if name == POLICY else f"/{name}"
                sums |= {f"gradient_norm{label}": (_norm(grads[name]), 0.0)}
                sums |= {f"parameter_norm{label}": (_norm(after[name]), 0.0)}
            if waits is not None:
                after[POLICY] = _chosen(waits, trained[POLICY], after[POLICY])
                states_after[POLICY] = _chosen(waits, optimizer_states[POLICY], states_after[POLICY])
            return (after, states_after), (sums, peaks, drift)

        carry = (
            {POLICY: trainable_part(model, state.params)} | {name: state.critics[name].params for name in critics},
            {POLICY: state.optimizer_state} | {name: state.critics[name].optimizer_state for name in critics},
        )
        if order.shape[0] == 1:
            carry, logged = one_update(carry, order[0])
            logged = jax.tree.map(lambda x: jnp.asarray(x)[None], logged)
        else:
            carry, logged = jax.lax.scan(one_update, carry, order)
        trained, optimizer_states = carry
        learned = {
            name: replace(state.critics[name], params=trained[name], optimizer_state=optimizer_states[name])
            for name in critics
        }
        state = replace(
            state,
            params=whole(model, trained[POLICY], kept),
            optimizer_state=optimizer_states[POLICY],
            critics=state.critics | learned,
            step=state.step + 1,
        )
        return refreshed(model, state, update), _learn_metrics(*logged)

    return learn


def refreshed(model: Model, state: TrainState, update: Update) -> TrainState:
    """The reference after a step: copied from the policy where that is due, or moved towards it."""
    if state.reference_params is None:
        return state
    reference = state.reference_params
    if update.reference_decay is not None:
        reference = anchors.ema(trainable_part(model, state.params), reference, decay=update.reference_decay)
    due = jnp.bool_(False)
    if update.refresh_reference_every:
        due |= state.step % update.refresh_reference_every == 0
    if update.refresh_reference_at:
        due |= jnp.isin(state.step, jnp.asarray(update.refresh_reference_at))
    if update.refreshes_reference:
        reference = _chosen(due, trainable_part(model, state.params), reference)
    return replace(state, reference_params=reference)


def alignment(
    model: Model,
    losses: Sequence[LossTerm],
    state: TrainState,
    experience: Experience,
    *,
    temperature: float,
    learning_rate: float,
) -> Array:
    """`losses.gradient_alignment` of this batch: whether supervised learning would lower a validation loss faster.

    Supervised are the losses that read written rows (`source`, but no `mask`); the others are reinforcement. The
    validation loss is that of the supervised losses on the rows that `validation` marks, whose weight is otherwise 0.
    """
    supervised = [t for t in losses if t.on_written]
    others = [t for t in losses if not t.on_written]

    def policy_gradient(terms: Sequence[LossTerm], rows: Experience) -> PyTree:
        objective = make_objective(model, terms, temperature=temperature)
        critics = {name: state.critics[name].params for name in objective.critics}
        factors = [jnp.float32(1.0 if t.coefficient_changes else t.coefficient) for t in terms]

        def value(part: PyTree) -> Array:
            trained, kept = {POLICY: part} | critics, frozen_part(model, state.params)
            reference = reference_policy(model, state)
            return objective.value(trained, kept, reference, rows, objective.denominators(rows), factors)[0]

        return jax.grad(value)(trainable_part(model, state.params))

    held_out = replace(experience, weight=experience.extras["validation"])
    return gradient_alignment(
        policy_gradient(supervised, held_out),
        policy_gradient(supervised, experience),
        policy_gradient(others, experience),
        learning_rate=learning_rate,
    )


def _chosen(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _norm(tree: PyTree) -> Array:
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))


def _drift(logprobs: Array, rows: Experience) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
    """How far the policy is from the one that sampled: peaks, and (sum, count) pairs over sampled tokens."""
    counted = rows.mask * (rows.weight[:, None] > 0) * (rows.source == Source.SAMPLED)
    if "extra" in rows.extras:  # drawn at another temperature
        counted = counted * ~rows.extras["extra"].astype(bool)[:, None]
    gap = jnp.where(counted > 0, jax.lax.stop_gradient(logprobs) - rows.behaviour_logprobs, 0.0)
    clipped = jnp.clip(gap, -20.0, 20.0)
    count = counted.sum()
    peaks = {"gap": jnp.abs(gap).max(), "ratio": jnp.exp(clipped).max()}
    return peaks, {"gap": (jnp.abs(gap).sum(), count), "kl": ((jnp.exp(clipped) - 1.0 - clipped).sum(), count)}


def _learn_metrics(sums, peaks, drift) -> dict[str, Array]:
    """Average each logged pair over updates. The sampler gap is that of the first update, before anything changed."""
    metrics = {}
    for name, (total, count) in sums.items():
        # Pairs without a count were divided already; they are averaged over updates.
        per_update = jnp.where(count == 0, total, total / jnp.where(count == 0, 1.0, count))
        metrics[name] = per_update.mean()
    safe = lambda pair, i: pair[0][i] / jnp.maximum(pair[1][i], 1.0)  # noqa: E731
    metrics["sampler_gap_max"] = peaks["gap"][0]
    metrics["sampler_gap_mean"] = safe(drift["gap"], 0)
    metrics["ratio_max"] = peaks["ratio"].max()
    metrics["kl_update"] = safe(drift["kl"], -1)
    return metrics
