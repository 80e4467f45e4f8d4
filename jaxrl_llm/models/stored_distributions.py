"""Next-token distributions from a file instead of a network: the k most likely tokens of each position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.model import Model

# Least total probability of all other tokens, so that no log-probability is infinite.
_LEAST_REST = 1e-6


def as_states(top_tokens: Int[Array, "B T k"], top_logprobs: Float[Array, "B T k"]) -> Float[Array, "B T 2k"]:
    """Stored distributions in the form of the hidden states of `stored_distributions`."""
    return jnp.concatenate([top_tokens.astype(jnp.float32), top_logprobs.astype(jnp.float32)], axis=-1)


def stored_distributions(vocabulary_size: int) -> Model:
    """A model that returns stored distributions; its hidden states are those of `as_states`.

    The k tokens have their stored log-probabilities, and the remaining probability is spread evenly over the others.

    Args:
      vocabulary_size: V, below 2^24.

    >>> model = stored_distributions(4)
    >>> states = as_states(jnp.array([[[2, 0]]]), jnp.log(jnp.array([[[0.5, 0.3]]])))
    >>> jax.nn.softmax(model.logits({}, states[0])).round(3).tolist()
    [[0.30000001192092896, 0.10000000149011612, 0.5, 0.10000000149011612]]
    """

    def logits(params: dict, hidden: Float[Array, "N 2k"]) -> Float[Array, "N V"]:
        del params
        tokens, logprobs = jnp.split(hidden, 2, axis=-1)
        there = tokens >= 0
        count = jnp.maximum(vocabulary_size - there.sum(-1, keepdims=True), 1)
        rest = jnp.maximum(1 - jnp.where(there, jnp.exp(logprobs), 0.0).sum(-1, keepdims=True), _LEAST_REST)
        others = jnp.broadcast_to(jnp.log(rest / count), (*hidden.shape[:-1], vocabulary_size))
        place = jnp.where(there, tokens, vocabulary_size).astype(jnp.int32)
        return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(others, place, logprobs)

    def nothing(*arguments: object, **options: object) -> tuple[Array, None]:
        raise ValueError("stored distributions have no forward pass; read them from the rows of the file")

    return Model(
        init=lambda key: {},
        apply=nothing,
        logits=logits,
        init_cache=nothing,
        expand_cache=nothing,
        specs={},
        vocabulary_size=vocabulary_size,
        config=None,
        packs=True,
    )
