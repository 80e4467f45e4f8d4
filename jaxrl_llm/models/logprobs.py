"""Log-probabilities, entropy and vocabulary-wide quantities from one chunked pass over hidden states.

The [B, T, V] tensor is never in memory: positions are processed in chunks, and the backward pass recomputes each chunk.
Sampler and trainer both use `scaled_log_softmax`, so their log-probabilities agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import map_shards, shards

# 2**25 float32 scores are 128 MiB: large enough for efficient matrix products, small compared to the parameters.
SCORES_PER_CHUNK = 2**25
NORMALISER = "normaliser"


class TokenStatistics(NamedTuple):
    """Results of a chunked pass, each [B, T] in float32.

    Attributes:
      logprobs: log-probability of the given token.
      entropy: in nats; None if it was not requested.
      over_vocabulary: one array for each requested functional.
    """

    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None
    over_vocabulary: tuple[Float[Array, "B T"], ...]


class Other(NamedTuple):
    """Another policy, whose distribution over the vocabulary is compared with the policy's.

    Attributes:
      model: has the function `logits`.
      params: its parameters.
      hidden: its hidden state that predicts each token.
      functionals: (log_p [..., V], log_q [..., V]) -> [...], evaluated inside a chunk; log_q is its log-softmax.
    """

    model: Model
    params: PyTree
    hidden: Float[Array, "B T E"]
    functionals: tuple[Callable, ...]


@jax.custom_jvp
def _normaliser(scores: Array) -> tuple[Array, Array]:
    """The largest score and log(sum exp(scores - largest)); log softmax is the scores minus both.

    Subtracting the two numbers separately loses less precision for large scores than subtracting their sum.
    """
    largest = jnp.max(scores, axis=-1, keepdims=True)
    return largest, jnp.log(jnp.sum(jnp.exp(scores - largest), axis=-1, keepdims=True))


def _kept_normaliser(scores: Array) -> tuple[Array, Array]:
    """The normaliser, named so that `jax.checkpoint` stores it and the backward pass need not reduce again."""
    largest, log_total = _normaliser(scores)
    return checkpoint_name(largest, NORMALISER), checkpoint_name(log_total, NORMALISER)


@_normaliser.defjvp
def _normaliser_jvp(primals, tangents):
    largest, log_total = _kept_normaliser(*primals)
    change = jnp.sum(jnp.exp(primals[0] - largest - log_total) * tangents[0], axis=-1, keepdims=True)
    return (largest, log_total), (jnp.zeros_like(largest), change)


@jax.custom_jvp
def _picked(scores: Array, tokens: Array) -> Array:
    """The score of each token."""
    return jnp.take_along_axis(scores, tokens[..., None], axis=-1)


@_picked.defjvp
def _picked_jvp(primals, tangents):
    # Written as a masked sum, so that XLA fuses its gradient with that of the normaliser; an indexed read would need
    # another array of this size.
    scores, tokens = primals
    chosen = jnp.arange(scores.shape[-1]) == tokens[..., None]
    return _picked(scores, tokens), jnp.sum(jnp.where(chosen, tangents[0], 0.0), axis=-1, keepdims=True)


def scaled_log_softmax(scores: Float[Array, "*B V"], temperature: float | Array) -> Float[Array, "*B V"]:
    """log softmax(scores / temperature) over the vocabulary, in float32."""
    scores = scores.astype(jnp.float32) / temperature
    largest, log_total = _normaliser(scores)
    return scores - largest - log_total


def entropy_of(log_probabilities: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """-sum p log p in nats; symbols of probability zero add nothing."""
    probabilities = jnp.exp(log_probabilities)
    # The inner where keeps 0 * -inf out of the gradient as well as out of the value.
    return -jnp.sum(probabilities * jnp.where(probabilities > 0, log_probabilities, 0.0), axis=-1)


def positions_per_chunk(rows: int, positions: int, vocabulary_size: int) -> int:
    """Positions of every row in one chunk, so that a chunk has at most `SCORES_PER_CHUNK` scores."""
    return max(1, min(positions, SCORES_PER_CHUNK // (rows * vocabulary_size)))


def token_statistics(
    model: Model,
    params: PyTree,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float | Float[Array, "B"] = 1.0,
    entropy: bool = False,
    others: tuple[Other, ...] = (),
    support: Int[Array, "B T S"] | None = None,
    chunk: int | None = None,
) -> TokenStatistics:
    """Log-probabilities of tokens under softmax(logits / temperature), computed in chunks of positions.

    Args:
      model: has the function `logits`.
      params: the policy's parameters.
      hidden: hidden state that predicts each token.
      tokens: the tokens to score.
      temperature: of the rollout; one number, or one per row.
      entropy: also return the entropy.
      others: policies whose distributions over the vocabulary are compared with the policy's.
      support: tokens that a truncated sampler could have sampled, including the given one: log-probability and entropy
        are those of the distribution over these tokens. Unused entries are -1; if all are -1, the support is the whole
        vocabulary.
      chunk: positions in a chunk; None derives it from the sizes.

    Returns:
      `TokenStatistics`.

    Raises:
      ValueError: for a functional over the vocabulary together with a support.
    """
    chex.assert_rank([hidden, tokens], [3, 2])
    if support is not None and others:
        raise ValueError(
            "samples were drawn from a truncated vocabulary (support), which cannot be combined with functionals over "
            "the vocabulary (others); remove one of them"
        )
    compared = tuple((other.model, other.functionals) for other in others)
    options = _Options(model, compared, entropy, chunk, shards("vocabulary"))
    scale = jnp.asarray(temperature, jnp.float32)
    scale = jnp.broadcast_to(scale if scale.ndim == 0 else scale[:, None], tokens.shape)
    # Each device scores its own tokens in chunks; a sharded vocabulary stays sharded, and reductions cross devices.
    whole = params, tuple(other.params for other in others)
    split = hidden, tokens, scale, tuple(other.hidden for other in others), support
    return map_shards(partial(_scored, options), whole, split, "rows", "positions")


class _Options(NamedTuple):
    """Options of `token_statistics`; `parts` is the number of shards of the vocabulary."""

    model: Model
    compared: tuple[tuple[Model, tuple[Callable, ...]], ...]
    entropy: bool
    chunk: int | None
    parts: int


def _scored(options: _Options, whole: PyTree, split: PyTree) -> TokenStatistics:
    """`token_statistics` of the rows and positions on this device."""
    model, compared, entropy, chunk, parts = options
    params, other_params = whole
    hidden, tokens, scale, *others = split
    rows, length = tokens.shape
    chunk = chunk or positions_per_chunk(rows, length, -(-model.vocabulary_size // parts))

    # Named arrays (the normaliser, the top k) are small compared to the scores, so they are stored, not recomputed.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_any_names_but_these())
    def score(hidden, tokens, scale, other_hidden, support):
        # Rows and positions are merged into one axis: on a CPU only products of two matrices use the fast kernels.
        flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        scale = scale.reshape(-1, 1)
        scores = model.logits(params, flat(hidden)).astype(jnp.float32) / scale
        largest, log_total = _normaliser(scores)
        log_p = scores - largest - log_total
        extra: list[Array] = []
        for (other, functionals), others_params, states in zip(compared, other_params, other_hidden, strict=True):
            log_q = jax.lax.stop_gradient(other.logits(others_params, flat(states)).astype(jnp.float32) / scale)
            for part in _kept_normaliser(log_q):
                log_q = log_q - part
            extra += [functional(log_p, log_q) for functional in functionals]
        if support is not None:
            log_p, largest, log_total = _over_support(scores, flat(support), log_p, largest, log_total)
        logprobs = _picked(scores, tokens.reshape(-1)) - largest - log_total
        statistics = TokenStatistics(logprobs, entropy_of(log_p) if entropy else None, tuple(extra))
        return jax.tree.map(lambda x: x.reshape(tokens.shape), statistics)

    if chunk >= length:
        return score(*split)

    count = -(-length // chunk)

    def cut(x, fill=0):
        sizes = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, sizes, constant_values=fill)
        return x.reshape(rows, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    # Padding of the last chunk has temperature 1: with 0 its gradient would not be finite.
    pieces = jax.tree.map(cut, (hidden, tokens)), cut(scale, 1), jax.tree.map(cut, tuple(others))
    chunks = jax.lax.map(lambda x: score(*x[0], x[1], *x[2]), pieces)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, count * chunk)[:, :length], chunks)


def _over_support(scores: Array, support: Array, *whole: Array) -> tuple[Array, Array, Array]:
    """(log-probabilities, their normaliser in two parts) over the support of each row; `whole` for an empty support."""
    there = support >= 0
    some = there.any(axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(scores, jnp.maximum(support, 0), axis=-1)
    # An empty support is replaced by one with equal scores, so that no infinite value enters its gradient.
    chosen = jnp.where(there | ~some, jnp.where(some, chosen, 0.0), -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(chosen, axis=-1, keepdims=True))
    log_total = jnp.log(jnp.sum(jnp.exp(chosen - largest), axis=-1, keepdims=True))
    kept = jnp.zeros(scores.shape, bool).at[jnp.arange(len(scores))[:, None], jnp.maximum(support, 0)].max(there)
    log_p = jnp.where(kept, scores - largest - log_total, -jnp.inf)
    ours = log_p, largest, log_total
    return jax.tree.map(lambda mine, theirs: jnp.where(some, mine, theirs), ours, whole)
