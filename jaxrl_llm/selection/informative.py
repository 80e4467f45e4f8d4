"""Filters of rows without a gradient: credit functions that return a new `weight`."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.statistics import group_max, group_min, group_size


@ranged
def nonconstant_groups(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, tolerance: NonNegative = 0.0
) -> Float[Array, "B"]:
    """Weights without groups of equal rewards: the filter of DAPO's dynamic sampling.

    Groups of one row are kept. The rollout refills the batch with new prompts.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      tolerance: largest difference of rewards that counts as equal.

    Returns:
      The new weight of each row.

    Raises:
      ValueError: for a negative tolerance.

    Reference: DAPO (2503.14476).
    Certainty: verified
    """
    spread = group_max(rewards, group, weight) - group_min(rewards, group, weight)
    kept = (spread > tolerance) | (group_size(group, weight) == 1)
    return jnp.where(kept & (weight > 0), weight.astype(jnp.float32), 0.0)


def nonzero_advantages(
    advantages: Float[Array, "B T"], mask: Float[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Weights without rows whose advantage is 0 on every token.

    Such rows have no gradient, but count in the denominators of averages.

    Args:
      advantages: advantage of each token.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.

    Returns:
      The new weight of each row.

    Reference: The surprising effectiveness of negative reinforcement (2506.01347).
    Certainty: verified
    """
    chex.assert_rank([advantages, mask, weight], [2, 2, 1])
    speaks = jnp.any((mask > 0) & (advantages != 0), axis=-1)
    return jnp.where(speaks & (weight > 0), weight.astype(jnp.float32), 0.0)
