"""Advantages scaled by a Beta density that is fitted to the success rates of the batch."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, xlog1py, xlogy
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Positive, ranged
from jaxrl_llm.statistics import group_leader, group_mean, group_std, present


@ranged
def beta_normalized(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    least_reward: float = 0.0,
    largest_reward: float = 1.0,
    largest_scale: Positive = 1e6,
) -> Float[Array, "B"]:
    """Reward minus the mean of its group, divided by the Beta density of that mean over the prompts of the batch: BNPO.

    With rewards mapped to [0, 1], p the mean of a group, m and v the mean and the unbiased variance of p over prompts:

        c = m (1 - m) / v - 1,   alpha = max(1, 1 + c m / 3),   beta = max(1, 1 + c (1 - m) / 3)
        A = min(1 / BetaPDF(p; alpha, beta), largest_scale) * (r - p)

    alpha = beta = 1 is plain centring: the case of one prompt, and of prompts with equal means. alpha = beta = 3/2 is
    division by the population's deviation, times pi / 8.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      least_reward: reward that maps to 0.
      largest_reward: reward that maps to 1.
      largest_scale: upper bound of 1 / BetaPDF, which is unbounded for rare success rates.

    Returns:
      One advantage per row, 0 in absent rows and in groups of equal rewards.

    Raises:
      ValueError: for largest_reward <= least_reward, or a largest_scale that is not positive.

    Reference: BNPO (2506.02864).
    Certainty: verified
    """
    chex.assert_rank([rewards, group, weight], 1)
    if largest_reward <= least_reward:
        raise ValueError(
            f"least_reward is {least_reward} and largest_reward is {largest_reward}; rewards are mapped to [0, 1], so "
            "the largest must be above the least"
        )
    share = (rewards.astype(jnp.float32) - least_reward) / (largest_reward - least_reward)
    rate = group_mean(share, group, weight)
    prompts, batch = group_leader(group, weight), jnp.zeros_like(group)
    mean, variance = group_mean(rate, batch, prompts), jnp.square(group_std(rate, batch, prompts))
    spread = variance > 0
    c = jnp.where(spread, mean * (1 - mean) / jnp.where(spread, variance, 1.0) - 1, 0.0)
    alpha, beta = jnp.maximum(1.0, 1 + c * mean / 3), jnp.maximum(1.0, 1 + c * (1 - mean) / 3)
    inside = jnp.clip(rate, 0.0, 1.0)
    log_density = xlogy(alpha - 1, inside) + xlog1py(beta - 1, -inside) - betaln(alpha, beta)
    return present(jnp.minimum(jnp.exp(-log_density), largest_scale) * (share - rate), weight)


@ranged
def beta_normalized_components(
    reward_components: Float[Array, "B K"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    least_reward: float = 0.0,
    largest_reward: float = 1.0,
    largest_scale: Positive = 1e6,
) -> Float[Array, "B"]:
    """Mean of `beta_normalized` over the reward components, each with a Beta density of its own.

    Args:
      reward_components: one column per reward function, all within the same range.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      least_reward, largest_reward, largest_scale: as in `beta_normalized`.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: as `beta_normalized`.

    Reference: BNPO (2506.02864).
    Certainty: verified
    """
    chex.assert_rank([reward_components, group, weight], [2, 1, 1])

    def one(rewards: Float[Array, "B"]) -> Float[Array, "B"]:
        return beta_normalized(
            rewards,
            group,
            weight,
            least_reward=least_reward,
            largest_reward=largest_reward,
            largest_scale=largest_scale,
        )

    return jax.vmap(one, in_axes=1)(reward_components).mean(0)
