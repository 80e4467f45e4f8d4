"""Whitening: advantages in units of their deviation over all tokens of the batch."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.group_relative.group_baselines import group_normalized
from jaxrl_llm.ranges import Natural, NonNegative, ranged
from jaxrl_llm.statistics import group_size, moments, token_weights


@ranged
def whitened(
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    center: bool = True,
    ddof: Natural = 1,
    eps: NonNegative = 1e-8,
) -> Float[Array, "B T"]:
    """Advantages with mean 0 and variance 1 over the tokens of the batch.

        (A - mean) / sqrt(variance + eps)

    Every token counts once, so long completions dominate the mean and the variance. Equal advantages give 0.

    Args:
      advantages: advantage of each token.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      center: whether the mean is removed; False only rescales.
      ddof: 1 for the unbiased variance, 0 for the population's.
      eps: added to the variance, in squared units of advantage.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Reference: PPO (1707.06347) as implemented for language models; REINFORCE++ (2501.03262).
    Certainty: verified
    """
    chex.assert_rank([advantages, mask], 2)
    chex.assert_equal_shape([advantages, mask])
    counts = token_weights(mask, weight)
    mean, variance = moments(advantages, counts, ddof=ddof)
    values = jnp.where(counts > 0, advantages.astype(jnp.float32), mean)
    centred = (values - mean) if center else jnp.where(counts > 0, values, 0.0)
    return centred / jnp.sqrt(variance + eps)


@ranged
def reinforce_plus_plus_baseline(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    eps: NonNegative = 1e-8,
) -> Float[Array, "B T"]:
    """Reward minus the mean of its group, whitened over the tokens of the batch: REINFORCE++-baseline.

    A group of one keeps its raw reward. A group of equal rewards gets -mean / std of the batch, which is 0 only where
    the token-weighted mean of the centred rewards is.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      eps: added to the variance.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Reference: REINFORCE++ (2501.03262).
    Certainty: verified
    """
    centred = group_normalized(rewards, group, weight, scale="none")
    alone = group_size(group, weight) == 1
    rows = jnp.where(alone, rewards.astype(jnp.float32), centred)
    return whitened(jnp.broadcast_to(rows[:, None], mask.shape), mask, weight, eps=eps)
