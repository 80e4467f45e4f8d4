"""Rewards shaped by the length relative to the group."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, ranged


@ranged
def relative_length_rewards(
    rewards: Float[Array, "B"],
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    coefficient: NonNegative = 1.0,
    short_gain: NonNegative = 1.0,
) -> Float[Array, "B"]:
    """Rewards plus a term that prefers the shorter of the right answers to a prompt.

        lam = 1/2 - (length - shortest) / (longest - shortest)
        right   r + coefficient * (short_gain * max(lam, 0) + min(lam, 0))
        wrong   r + coefficient * min(lam, 0)

    Shortest and longest are over all samples of the prompt, right or wrong. A wrong answer has no gain from shortness,
    and a right one can lose. Where all lengths are equal the term is 0. Kimi k1.5 starts without it and raises the
    coefficient to 1; Light-R1 has a weaker preference for short right answers, short_gain 1/2.

    Args:
      rewards: rewards before the term.
      correct: 1 for a right answer, 0 for a wrong one.
      length: completion tokens.
      group: id of the group each row belongs to.
      weight: 0 for absent rows, whose lengths do not count.
      coefficient: weight of the term.
      short_gain: factor of its positive part.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for a negative coefficient or gain.

    Reference: Kimi k1.5 (2501.12599); Light-R1 (2503.10460).
    Certainty: verified
    """
    chex.assert_rank([rewards, correct, length, group, weight], 1)
    chex.assert_equal_shape([rewards, correct, length, group, weight])
    tokens, rows, there = length.astype(jnp.float32), len(length), weight > 0
    shortest = jax.ops.segment_min(jnp.where(there, tokens, jnp.inf), group, rows)[group]
    longest = jax.ops.segment_max(jnp.where(there, tokens, -jnp.inf), group, rows)[group]
    differs = there & (longest > shortest)
    lam = jnp.where(differs, 0.5 - (tokens - shortest) / jnp.where(differs, longest - shortest, 1.0), 0.0)
    gain = jnp.where(correct > 0, short_gain * jnp.maximum(lam, 0.0), 0.0)
    return rewards.astype(jnp.float32) + coefficient * (gain + jnp.minimum(lam, 0.0))
