"""Whitening: advantages in units of their deviation over all tokens of the batch."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.group_relative import group_normalized
from jaxrl_llm.advantages.groups import group_size


def token_weights(mask: Float[Array, "B T"], weight: Float[Array, "B"]) -> Float[Array, "B T"]:
    """How much each token counts: the row's weight on trained tokens, 0 elsewhere."""
    chex.assert_rank([mask, weight], [2, 1])
    return jnp.where(mask > 0, 1.0, 0.0) * weight.astype(jnp.float32)[:, None]


def moments(values: Array, weights: Array, *, ddof: int = 1) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted mean and variance of all entries of weight above 0; equal entries have variance exactly 0.

    The divisor of the variance is W - ddof * sum w^2 / W with W = sum w: n - ddof for weights 0 and 1.
    """
    chex.assert_equal_shape([values, weights])
    values = jnp.where(weights > 0, values.astype(jnp.float32), 0.0)
    total = weights.sum()
    divisor = jnp.where(total > 0, total, 1.0)
    # Measured from the smallest entry, so that equal entries differ by exactly 0 (see `group_mean`).
    smallest = jnp.min(jnp.where(weights > 0, values, jnp.inf))
    origin = jnp.where(total > 0, smallest, 0.0)
    mean = origin + (weights * (values - origin)).sum() / divisor
    squares = (weights * jnp.square(values - mean)).sum()
    enough = ((weights > 0).sum() > ddof) & (squares > 0)
    effective = total - ddof * jnp.square(weights).sum() / divisor
    return mean, jnp.where(enough, squares / jnp.where(enough, effective, 1.0), 0.0)


def whitened(
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    center: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
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
      One advantage a token, 0 outside the mask and in absent rows.

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


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    eps: float = 1e-8,
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
      One advantage a token, 0 outside the mask and in absent rows.

    Reference: REINFORCE++ (2501.03262).
    Certainty: verified
    """
    centred = group_normalized(rewards, group, weight, scale="none")
    alone = group_size(group, weight) == 1
    rows = jnp.where(alone, rewards.astype(jnp.float32), centred)
    return whitened(jnp.broadcast_to(rows[:, None], mask.shape), mask, weight, eps=eps)
