"""Learn: experience -> new parameters, over epochs, minibatches and microbatches.

Losses are sums and counts. The counts do not depend on the parameters, so those of a whole minibatch are known
before the first microbatch is differentiated, and the gradient is the same however the minibatch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, Loss, Method
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.score import predicting_hidden
from jaxrl_llm.training.wiring import call, fields_of, names, signature

# Names that a loss may ask for beyond the fields of Experience.
LEARNER_NAMES = frozenset({"logprobs", "entropy", "over_vocabulary"})


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
    """

    epochs_per_batch: int = 1
    minibatches_per_epoch: int = 1
    sequences_per_microbatch: int | None = None
    refresh_reference_every: int = 0


def checked_split(update: Update, prompts: int, samples: int, losses: Sequence[LossTerm]) -> int:
    """Microbatches in a minibatch.

    Raises:
      ValueError: when the batch does not divide as `update` asks.
    """
    if prompts % update.minibatches_per_epoch:
        raise ValueError(
            f"training.minibatches_per_epoch is {update.minibatches_per_epoch}, which does not divide "
            f"training.prompts_per_step {prompts}; minibatches hold whole groups, so choose a divisor of {prompts}"
        )
    rows = prompts * samples // update.minibatches_per_epoch
    size = update.sequences_per_microbatch or rows
    if rows % size:
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, which does not divide the {rows} sequences of a minibatch "
            f"({prompts} prompts x {samples} samples / {update.minibatches_per_epoch} minibatches); choose a divisor"
        )
    whole = [term.name for term in losses if "group" in names(term.function)]
    if whole and size % samples:
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, but loss {whole[0]!r} compares the samples of a prompt, so "
            f"a microbatch must hold whole groups: choose a multiple of rollout.samples_per_prompt {samples}"
        )
    return rows // size


def minibatch_rows(key: Array, update: Update, prompts: int, samples: int) -> Array:
    """Row numbers [updates, rows]: each epoch visits the groups in a new order, cut into minibatches."""
    if update.minibatches_per_epoch == 1:
        order = jnp.tile(jnp.arange(prompts), (update.epochs_per_batch, 1))
    else:
        keys = jax.random.split(key, update.epochs_per_batch)
        order = jax.vmap(lambda k: jax.random.permutation(k, prompts))(keys)
    rows = order[..., None] * samples + jnp.arange(samples)
    return rows.reshape(update.epochs_per_batch * update.minibatches_per_epoch, -1)


def make_learn(
    model: Model,
    optimizer: optax.GradientTransformation,
    losses: Sequence[LossTerm],
    update: Update,
    *,
    temperature: float,
    samples_per_prompt: int,
) -> Callable:
    """Build learn(params, optimizer_state, reference_params, experience, coefficients, key).

    It returns (params, optimizer_state, metrics).

    Only what the losses name is computed: a loss that names `entropy` or carries an `over_vocabulary` functional
    has it evaluated in the same chunked pass as the log-probabilities.
    """
    with_entropy = any("entropy" in signature(term.function).required for term in losses)
    functionals = {t.name: t.function.over_vocabulary for t in losses if "over_vocabulary" in names(t.function)}

    def hidden_of(params: PyTree, rows: Experience) -> Array:
        return predicting_hidden(model, params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)

    def terms(rows: Experience, learner: dict[str, Any], over_vocabulary: Mapping[str, Any]) -> list[Loss]:
        provided = fields_of(rows) | learner
        provided["mask"] = rows.mask * rows.weight[:, None]
        return [call(term.function, provided | {"over_vocabulary": over_vocabulary.get(term.name)}) for term in losses]

    def denominators(rows: Experience) -> list[Array]:
        nothing = jnp.zeros(rows.tokens.shape, jnp.float32)
        placeholders: dict[str, Any] = {"logprobs": nothing} | ({"entropy": nothing} if with_entropy else {})
        counts = [loss.denominator for loss in terms(rows, placeholders, dict.fromkeys(functionals, nothing))]
        return [jnp.float32(1.0) if d is None else jnp.where(d == 0, 1.0, d) for d in counts]

    def objective(params, reference_params, rows: Experience, counts, coefficients):
        reference = None
        if functionals:
            reference = (reference_params, jax.lax.stop_gradient(hidden_of(reference_params, rows)))
        statistics = token_statistics(
            model,
            params,
            hidden_of(params, rows),
            rows.tokens,
            temperature=temperature,
            entropy=with_entropy,
            over_vocabulary=tuple(functionals.values()),
            reference=reference,
        )
        learner: dict[str, Any] = {"logprobs": statistics.logprobs}
        if with_entropy:
            learner["entropy"] = statistics.entropy
        parts = terms(rows, learner, dict(zip(functionals, statistics.over_vocabulary, strict=True)))
        values = [loss.numerator / count for loss, count in zip(parts, counts, strict=True)]
        total = sum((c * v for c, v in zip(coefficients, values, strict=True)), jnp.float32(0.0))
        sums = {f"loss/{term.name}": (value, 0.0) for term, value in zip(losses, values, strict=True)}
        sums["loss"] = (total, 0.0)
        for term, loss in zip(losses, parts, strict=True):
            sums |= {f"{name}/{term.name}": pair for name, pair in loss.metrics.items()}
        return total, (sums, _drift(statistics.logprobs, rows))

    def gradient(params, reference_params, rows: Experience, coefficients):
        counts = denominators(rows)
        size = update.sequences_per_microbatch or rows.tokens.shape[0]
        pieces = rows.tokens.shape[0] // size
        differentiate = jax.grad(objective, has_aux=True)
        if pieces == 1:
            return differentiate(params, reference_params, rows, counts, coefficients)
        split = jax.tree.map(lambda x: x.reshape(pieces, size, *x.shape[1:]), rows)

        def accumulate(carry, piece):
            grads, (sums, (peaks, drift)) = differentiate(params, reference_params, piece, counts, coefficients)
            old_grads, (old_sums, (old_peaks, old_drift)) = carry
            add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
            peaks = jax.tree.map(jnp.maximum, old_peaks, peaks)
            return (add(old_grads, grads), (add(old_sums, sums), (peaks, add(old_drift, drift)))), None

        first = jax.eval_shape(
            differentiate, params, reference_params, jax.tree.map(lambda x: x[0], split), counts, coefficients
        )
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        return jax.lax.scan(accumulate, zero, split)[0]

    def learn(params, optimizer_state, reference_params, experience: Experience, coefficients, key):
        prompts = experience.tokens.shape[0] // samples_per_prompt
        order = minibatch_rows(key, update, prompts, samples_per_prompt)

        def one_update(carry, rows):
            params, optimizer_state = carry
            batch = experience if order.shape[0] == 1 else jax.tree.map(lambda x: x[rows], experience)
            grads, (sums, (peaks, drift)) = gradient(params, reference_params, batch, coefficients)
            deltas, optimizer_state = optimizer.update(grads, optimizer_state, params)
            params = optax.apply_updates(params, deltas)
            norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
            size = optax.tree.norm(jax.tree.map(lambda p: p.astype(jnp.float32), params))
            # The norm after the update: what a checkpoint would hold is looked at before it is written.
            sums = sums | {"gradient_norm": (norm, 0.0), "parameter_norm": (size, 0.0)}
            return (params, optimizer_state), (sums, peaks, drift)

        if order.shape[0] == 1:
            (params, optimizer_state), logged = one_update((params, optimizer_state), order[0])
            logged = jax.tree.map(lambda x: jnp.asarray(x)[None], logged)
        else:
            (params, optimizer_state), logged = jax.lax.scan(one_update, (params, optimizer_state), order)
        return params, optimizer_state, _learn_metrics(*logged)

    return learn


def _drift(logprobs: Array, rows: Experience) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
    """How far the policy is from the one that sampled: peaks, and (sum, count) pairs over sampled tokens."""
    counted = rows.mask * (rows.weight[:, None] > 0)
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
