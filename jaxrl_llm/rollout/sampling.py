"""Drawing one token a row, with randomness that is addressed and never consumed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.parallel.rules import constrain


def row_keys(key: Array, step: Array | int, prompt_id: Int[Array, "B"], sample: Int[Array, "B"]) -> Array:
    """One key a row from (run key, step, prompt id, sample number).

    A row's key does not depend on the other rows, so neither do its tokens: batch size, order, devices and hosts
    change nothing.
    """
    at_step = jax.random.fold_in(key, step)
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(at_step, p), s))(prompt_id, sample)


def sampled_tokens(
    log_probabilities: Float[Array, "B V"], keys: Array, position: Array | int, greedy: Array | bool
) -> Int[Array, "B"]:
    """One token a row by inverting the cumulative distribution at a uniform number.

    One uniform a row replaces V Gumbel variables, which costs more than the softmax itself on a CPU.

    Args:
      log_probabilities: the distribution to draw from.
      keys: one key a row (`row_keys`).
      position: index of the token in its completion, folded into each key.
      greedy: scalar or [B]; True takes the most likely token instead.

    Returns:
      token ids; never a symbol of probability zero.
    """
    # The sum along a row is taken in one order whatever the mesh: rows are split further instead of the vocabulary.
    log_probabilities = constrain(log_probabilities, "sampled_rows", None)
    uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, position)))(keys)
    probabilities = jnp.exp(log_probabilities)
    cumulative = jnp.cumsum(probabilities, axis=-1)
    passed = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    likeliest = jnp.argmax(log_probabilities, axis=-1)
    # A parallel prefix sum may round so that nothing passes; the likeliest symbol is then the answer.
    drawn = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), likeliest)
    return jnp.where(greedy, likeliest, drawn).astype(jnp.int32)
