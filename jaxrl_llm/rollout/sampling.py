"""Sampling of one token per row; random keys are computed from addresses and never split in sequence."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import key_at
from jaxrl_llm.parallel.rules import constrain

# About the square root of a vocabulary.
BLOCK = 256


def row_keys(
    key: Array, step: Int[Array, "B"] | Array | int, prompt_id: Int[Array, "B"], sample: Int[Array, "B"]
) -> Array:
    """One key per row from (run key, step, prompt id, sample number).

    A row's key does not depend on the other rows, so its tokens do not depend on batch size, order, devices or hosts.

    Args:
      key: of the run.
      step: one number, or one a row, of rows that were begun in different steps.
      prompt_id: of each row's prompt.
      sample: number of the row within its group.
    """
    if jnp.ndim(step):
        return jax.vmap(partial(key_at, key))(step, prompt_id, sample)
    return jax.vmap(partial(key_at, jax.random.fold_in(key, step)))(prompt_id, sample)


def sampled_tokens(
    log_probabilities: Float[Array, "B V"], keys: Array, position: Int[Array, "B"] | int, greedy: Array | bool
) -> Int[Array, "B"]:
    """One token per row, by inverting the cumulative distribution at a uniform number.

    One uniform a row replaces V Gumbel variables, which costs more than the softmax itself on a CPU.

    Args:
      log_probabilities: the distribution to draw from.
      keys: one key a row (`row_keys`).
      position: index of the token in its completion, one number or one a row; folded into the key.
      greedy: scalar or [B]; True takes the most likely token instead. Where it is False itself, it is not looked for.

    Returns:
      token ids; never a symbol of probability zero.
    """
    # The sum along a row is taken in one order whatever the mesh: rows are split further instead of the vocabulary.
    log_probabilities = constrain(log_probabilities, "sampled_rows", None)
    at = jnp.broadcast_to(jnp.asarray(position), keys.shape)
    uniform = jax.vmap(lambda k, at: jax.random.uniform(jax.random.fold_in(k, at)))(keys, at)
    rows, size = log_probabilities.shape
    # First the block of symbols, then the symbol: a prefix sum over the whole vocabulary costs several passes over it.
    blocks = -(-size // BLOCK)
    padded = jnp.pad(jnp.exp(log_probabilities), ((0, 0), (0, blocks * BLOCK - size)))
    probabilities = padded.reshape(rows, blocks, BLOCK)
    totals = probabilities.sum(-1)
    block, target = _first_beyond(totals, uniform)
    inside = jnp.take_along_axis(probabilities, block[:, None, None], axis=1)[:, 0]
    symbol, _ = _first_beyond(inside, target / jnp.take_along_axis(totals, block[:, None], axis=1)[:, 0])
    drawn = block * BLOCK + symbol
    if greedy is not False:
        drawn = jnp.where(greedy, jnp.argmax(log_probabilities, axis=-1), drawn)
    return drawn.astype(jnp.int32)


def _first_beyond(mass: Float[Array, "B N"], share: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The first entry of a row at which the running sum exceeds a share of the whole, and how far that goes into it.

    Never an entry of no mass: a prefix sum may round so that none passes, and the heaviest is then the answer.
    """
    running = jnp.cumsum(mass, axis=-1)
    target = share[:, None] * running[:, -1:]
    passed = (running > target) & (mass > 0)
    entry = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), jnp.argmax(mass, axis=-1))
    at = lambda x: jnp.take_along_axis(x, entry[:, None], axis=1)[:, 0]  # noqa: E731
    return entry, jnp.maximum(target[:, 0] - (at(running) - at(mass)), 0.0)
