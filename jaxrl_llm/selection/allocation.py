"""Allocation of rollouts to the prompts whose confidence interval of the mean reward would shrink most."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Natural, NonNegative, OpenShare, ranged
from jaxrl_llm.statistics import group_leader, group_size, group_std


@ranged
def reward_half_width(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, confidence: OpenShare = 0.95
) -> Float[Array, "B"]:
    """Half-width of the confidence interval of the mean reward of the row's group.

        h(n) = t * s / sqrt(n)    with s the unbiased deviation and t the Student quantile for n - 1 degrees of freedom

    It is 0 for groups of one row and groups of equal rewards.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      confidence: of the interval.

    Returns:
      One number per row, in units of reward.

    Raises:
      ValueError: for a confidence outside (0, 1).

    Reference: XRPO (2510.06672).
    Certainty: reconstructed
    """
    factors = _interval_factors(len(group), confidence)
    return jnp.where(weight > 0, factors[group_size(group, weight)] * group_std(rewards, group, weight), 0.0)


@ranged
def rollout_priority(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""] | None = None,
    *,
    confidence: OpenShare = 0.95,
    exploration: NonNegative = 0.0,
) -> Float[Array, "B"]:
    """Expected benefit of one more rollout of the row's prompt.

        h(n) - h(n + 1) + exploration * sqrt(log(1 + T) / n)

    with h as in `reward_half_width` at the same deviation and n the rollouts of the prompt. The form of the exploration
    term is from secondary sources, which differ in T; its constant is unknown.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      step: T, the number of completed steps; None: T is the number of rollouts of all prompts.
      confidence: of the interval.
      exploration: weight of the bonus for prompts with few rollouts.

    Returns:
      One number per row, equal within a group; 0 in absent rows.

    Raises:
      ValueError: for a confidence outside (0, 1) or a negative exploration.

    Reference: XRPO (2510.06672).
    Certainty: reconstructed
    """
    deviation, counts = group_std(rewards, group, weight), group_size(group, weight)
    factors = _interval_factors(len(group), confidence)
    clock = (weight > 0).sum() if step is None else step
    priority = _priority(deviation, counts, clock, factors, exploration)
    return jnp.where(weight > 0, priority, 0.0)


@ranged
def next_rollouts(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""] | None = None,
    *,
    rollouts: Natural,
    confidence: OpenShare = 0.95,
    exploration: NonNegative = 0.0,
) -> Int[Array, "B"]:
    """Number of the next `rollouts` for each prompt, allotted one by one to the prompt of largest `rollout_priority`.

    Each allotted rollout counts in the next comparison, at an unchanged deviation. Without exploration, prompts of
    equal rewards get none, unless all prompts have equal rewards. Ties go to the prompt of fewest rollouts, then to the
    first one.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      step: T, the number of completed steps; None: T is the number of rollouts of all prompts.
      rollouts: rollouts of the next round.
      confidence: of the interval.
      exploration: weight of the bonus for prompts with few rollouts.

    Returns:
      The number of rollouts of a group on its first present row, 0 elsewhere; the sum is `rollouts`.

    Raises:
      ValueError: for a negative number of rollouts or exploration, or a confidence outside (0, 1).

    Reference: XRPO (2510.06672).
    Certainty: reconstructed
    """
    leaders = group_leader(group, weight) > 0
    deviation, counts = group_std(rewards, group, weight), group_size(group, weight)
    factors = _interval_factors(len(group) + rollouts, confidence)

    def give(given, _):
        clock = (weight > 0).sum() + given.sum() if step is None else step
        priority = jnp.where(leaders, _priority(deviation, counts + given, clock, factors, exploration), -jnp.inf)
        chosen = jnp.argmin(
            jnp.where(leaders & (priority == priority.max()), counts + given, len(group) + rollouts + 1)
        )
        return given.at[chosen].add(jnp.any(leaders).astype(given.dtype)), None

    return jax.lax.scan(give, jnp.zeros(len(group), jnp.int32), length=rollouts)[0]


def _priority(deviation, counts, clock, factors, exploration):
    drop = deviation * (factors[counts] - factors[counts + 1])
    bonus = jnp.sqrt(jnp.log1p(jnp.asarray(clock, jnp.float32)) / jnp.maximum(counts, 1))
    return drop + exploration * bonus


def _interval_factors(most: int, confidence: float) -> Float[Array, "N"]:
    """t / sqrt(n) for n = 0 .. most + 1; 0 for n < 2, where the deviation is undefined."""
    from scipy.special import stdtrit  # takes a while to import

    n = np.arange(2, most + 2)
    factors = stdtrit(n - 1, (1 + confidence) / 2) / np.sqrt(n)
    return jnp.asarray(np.concatenate([[0.0, 0.0], factors]), jnp.float32)
