"""Rewards with a length limit that depends on the difficulty of the prompt."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Share, ShareBelowOne, ranged
from jaxrl_llm.statistics import group_mean


@ranged
def difficulty_truncation(
    rewards: Float[Array, "B"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    max_completion_tokens: int,
    least_share: Share = 0.5,
    easy_from: ShareBelowOne = 0.5,
) -> Float[Array, "B"]:
    """Rewards set to 0 for completions above a length limit that is tighter for prompts solved often.

        limit = L * (1 - (1 - least_share) * max(0, (p - easy_from) / (1 - easy_from)))

    with p the share of the group's samples whose reward is above 0, and L = max_completion_tokens. A prompt solved less
    often than `easy_from` has the whole limit, one that is always solved `least_share` of it. DLER shortens the
    truncation limit of easy prompts; the linear interpolation is ours.

    Args:
      rewards: rewards before the limit.
      length: completion tokens.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      max_completion_tokens: L.
      least_share: of L, for prompts that are always solved.
      easy_from: share of right samples from which the limit shrinks.

    Returns:
      One reward per row, float32.

    Reference: DLER, difficulty-aware (2510.15110).
    Certainty: reconstructed
    """
    chex.assert_rank([rewards, length, group, weight], 1)
    rate = group_mean((rewards > 0).astype(jnp.float32), group, weight)
    easy = jnp.clip((rate - easy_from) / (1 - easy_from), 0.0, 1.0)
    limit = max_completion_tokens * (1 - (1 - least_share) * easy)
    return jnp.where(length <= limit, rewards.astype(jnp.float32), 0.0)
