"""Larger advantages for right answers that are unlikely under the policy."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.statistics import group_mean


@ranged
def novelty_sharpened(
    advantages: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    strength: NonNegative = 2.5,
    cap: NonNegative = 0.5,
) -> Float[Array, "B T"]:
    """Positive advantages with a bonus for answers less probable than the group's mean: XRPO.

        s_i = mean_t log pi of answer i,   eta_i = exp(s_i - mean of s over the group)
        where A > 0:  A <- A + min(max(strength * (1 - eta_i), 0), cap * A)

    Probable answers, wrong answers and groups of equal rewards are unchanged. The defaults are the published values;
    the condition A > 0 is our reading.

    Args:
      advantages: advantage of each token.
      old_logprobs: log-probability of each token under the policy that the update starts from.
      group: id of the group each row belongs to.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      strength: bonus of an answer of probability 0, in units of advantage.
      cap: largest bonus as a multiple of the advantage.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for a negative strength or cap.

    Reference: XRPO (2510.06672).
    Certainty: reconstructed
    """
    chex.assert_rank([advantages, old_logprobs, mask, group, weight], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([advantages, old_logprobs, mask])
    counted = (mask > 0) & (weight > 0)[:, None]
    tokens = counted.sum(-1)
    score = jnp.where(counted, old_logprobs.astype(jnp.float32), 0.0).sum(-1) / jnp.maximum(tokens, 1)
    answered = jnp.where(tokens > 0, weight.astype(jnp.float32), 0.0)
    likelihood = jnp.exp(jnp.minimum(score - group_mean(score, group, answered), 20.0))
    bonus = jnp.maximum(strength * (1 - likelihood), 0.0)[:, None]
    advantages = jnp.where(counted, advantages.astype(jnp.float32), 0.0)
    return jnp.where(advantages > 0, advantages + jnp.minimum(bonus, cap * advantages), advantages)
