"""Advantages relative to the other samples of the same prompt."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Natural, NonNegative, ranged
from jaxrl_llm.statistics import group_mean, group_size, group_std, group_sum, present

Scale = Literal["group", "batch", "none"]


@ranged
def group_normalized(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    scale: Scale = "group",
    ddof: Natural = 1,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B"]:
    """Reward minus the mean of its group, in units of a standard deviation: the advantage of GRPO and Dr.GRPO.

        group   A = (r - mean_group) / (std_group + eps)     GRPO
        batch   A = (r - mean_group) / (std_batch + eps)
        none    A = r - mean_group                           Dr.GRPO

    Equal rewards and groups of one give exactly 0.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      scale: which standard deviation divides.
      ddof: 1 for the unbiased deviation, 0 for the population's.
      eps: added to the deviation, in units of reward (1e-4 in TRL).

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for an unknown scale.

    Reference: GRPO (2402.03300); Dr.GRPO (2503.20783).
    Certainty: verified
    """
    centred = rewards.astype(jnp.float32) - group_mean(rewards, group, weight)
    match scale:
        case "group":
            centred = centred / (group_std(rewards, group, weight, ddof=ddof) + eps)
        case "batch":
            centred = centred / (group_std(rewards, jnp.zeros_like(group), weight, ddof=ddof) + eps)
        case "none":
            pass
        case _:
            raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(get_args(Scale))}")
    return present(centred, weight)


def leave_one_out(rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """Reward minus the mean of the other samples of the group: an unbiased baseline.

        A_i = r_i - mean_{j != i} r_j = (r_i - mean_group) * G / (G - 1)

    Groups of one give 0.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One advantage per row, 0 in absent rows.

    Reference: RLOO (2402.14740).
    Certainty: verified
    """
    weight = weight.astype(jnp.float32)
    centred = rewards.astype(jnp.float32) - group_mean(rewards, group, weight)
    total = group_sum(jnp.ones_like(centred), group, weight)
    others = jnp.where(group_size(group, weight) > 1, total - weight, 0.0)
    advantages = jnp.where(others > 0, centred * total / jnp.where(others > 0, others, 1.0), 0.0)
    return present(advantages, weight)


def length_weighted_baseline(
    rewards: Float[Array, "B"], length: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Reward minus the length-weighted mean of its group.

        A = r - (sum_j length_j r_j) / (sum_j length_j)

    The baseline of least gradient variance when the squared norm of a sequence's gradient grows with its length.

    Args:
      rewards: total reward of each row.
      length: completion tokens of each row; 0 counts as 1.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One advantage per row, 0 in absent rows.

    Reference: OPO (2505.23585).
    Certainty: verified
    """
    tokens = jnp.maximum(length, 1).astype(jnp.float32)
    baseline = group_mean(rewards, group, weight.astype(jnp.float32) * tokens)
    return present(rewards.astype(jnp.float32) - baseline, weight)
