"""REINFORCE with no baseline, with a running mean, and with a precomputed baseline."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import ShareBelowOne, ranged
from jaxrl_llm.statistics import group_mean, present


def raw_rewards(rewards: Float[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """The reward itself: REINFORCE without a baseline.

    Args:
      rewards: total reward of each row.
      weight: weight of each row; 0 is absent.

    Returns:
      One advantage per row, 0 in absent rows.

    Reference: Williams, REINFORCE (1992).
    Certainty: verified
    """
    return present(rewards, weight)


def reward_minus_baseline(
    rewards: Float[Array, "B"], baseline_rewards: Float[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Reward minus a given baseline; with the reward of the prompt's greedy answer it is ReMax.

    Args:
      rewards: total reward of each row.
      baseline_rewards: baseline of each row.
      weight: weight of each row; 0 is absent.

    Returns:
      One advantage per row, 0 in absent rows.

    Reference: ReMax (2310.10505).
    Certainty: verified
    """
    return present(rewards.astype(jnp.float32) - baseline_rewards.astype(jnp.float32), weight)


@ranged
def running_mean_baseline(*, decay: ShareBelowOne = 0.9) -> Method:
    """Reward minus an exponential moving average of the mean reward of earlier batches.

        A = r - b
        after the batch: s <- decay * s + (1 - decay) * mean(r),   m <- decay * m + (1 - decay),   b = s / m

    Dividing by m removes the bias towards the initial 0. The first batch uses its own mean.

    Args:
      decay: share of the past that is kept at each batch.

    Returns:
      A method that remembers s and m; its update gives one advantage per row, 0 in absent rows.

    Raises:
      ValueError: for a decay outside [0, 1).

    Reference: Williams, REINFORCE (1992).
    Certainty: verified
    """

    def init():
        return {"sum": jnp.zeros((), jnp.float32), "mass": jnp.zeros((), jnp.float32)}

    def update(memory, rewards: Float[Array, "B"], weight: Float[Array, "B"]):
        whole_batch = jnp.zeros(rewards.shape, jnp.int32)
        mean = group_mean(rewards, whole_batch, weight)[0]
        past = memory["mass"] > 0
        baseline = jnp.where(past, memory["sum"] / jnp.where(past, memory["mass"], 1.0), mean)
        # An empty batch leaves the memory unchanged.
        kept = jnp.where(jnp.any(weight > 0), decay, 1.0)
        memory = {"sum": kept * memory["sum"] + (1 - kept) * mean, "mass": kept * memory["mass"] + (1 - kept)}
        return present(rewards.astype(jnp.float32) - baseline, weight), memory

    return Method(init, update)
