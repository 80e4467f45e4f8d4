"""Baselines other than the group's mean: on samples of an older policy they set the weight of good and bad answers."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Positive, ranged
from jaxrl_llm.statistics import group_max, group_mean, group_size, present


@ranged
def shifted_mean_baseline(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, shift: float = -0.1
) -> Float[Array, "B"]:
    """Reward minus the shifted mean of its group: AsymRE.

        A = r - (mean_group + shift)

    A negative shift gives good answers more weight than bad ones, which keeps REINFORCE stable on samples of an older
    policy. Equal rewards give -shift.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      shift: added to the baseline, in units of reward.

    Returns:
      One advantage per row, 0 in absent rows.

    Reference: Group-relative REINFORCE off-policy (2509.24203); AsymRE (2506.20520).
    Certainty: verified
    """
    return present(rewards.astype(jnp.float32) - group_mean(rewards, group, weight) - shift, weight)


@ranged
def log_mean_exp_baseline(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, temperature: Positive = 1.0
) -> Float[Array, "B"]:
    """Reward minus the soft maximum of its group: the baseline of OPMD.

        A = r - temperature * log mean_group exp(r / temperature)

    A small temperature compares with the best answer, a large one with the mean. OPMD's loss is `policy_gradient` with
    coefficient 1 / (1 + temperature).

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      temperature: in units of reward.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for a temperature that is not positive.

    Reference: Group-relative REINFORCE off-policy (2509.24203).
    Certainty: verified
    """
    below_best = rewards.astype(jnp.float32) - group_max(rewards, group, weight)
    mean = group_mean(jnp.exp(present(below_best, weight) / temperature), group, weight)
    soft_maximum = temperature * jnp.log(jnp.where(mean > 0, mean, 1.0))
    return present(below_best - soft_maximum, weight)


@ranged
def amplified_gains(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    factor: Positive = 3.0,
    most: float = 1.0,
) -> Float[Array, "B"]:
    """Advantage 1 for successes; gains over the group's mean are amplified, losses not: R3L's positive amplification.

        A = 1 where r >= most,   factor (r - b) where r >= b,   r - b elsewhere;   b = mean_group, 0 of a single row

    Successes are trained on even where the whole group succeeds.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      factor: multiplies gains.
      most: reward from which a row is a success.

    Returns:
      One advantage per row, 0 in absent rows.

    Reference: R3L.
    Certainty: verified
    """
    r = rewards.astype(jnp.float32)
    gain = r - jnp.where(group_size(group, weight) > 1, group_mean(r, group, weight), 0.0)
    return present(jnp.where(r >= most, 1.0, jnp.where(gain >= 0, factor * gain, gain)), weight)
