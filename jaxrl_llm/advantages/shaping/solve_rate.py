"""Advantages weighted by how often their prompt is solved."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.statistics import group_mean


@ranged
def solve_rate_weighted(
    advantages: Float[Array, "B T"],
    correct: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    scale: NonNegative = 7.2,
) -> Float[Array, "B T"]:
    """Advantages, larger for prompts that are solved about as often as not.

        A * scale * d * (1 - d),   d the share of right answers in the group

    Args:
      advantages: advantages before, one per token.
      correct: 1 for a right answer.
      group: id of the group each row belongs to.
      weight: 0 for absent rows.
      scale: the factor at d = 1/2 is a quarter of it, 1.8 in the paper.

    Returns:
      One advantage per token; 0 for prompts that are always or never solved.

    Reference: Observe-R1 (2505.12432).
    Certainty: verified
    """
    chex.assert_rank([advantages, correct, group, weight], [2, 1, 1, 1])
    d = group_mean((correct > 0).astype(jnp.float32), group, weight)
    return advantages.astype(jnp.float32) * (scale * d * (1 - d))[:, None]
