"""Advantages of several rewards at once, each normalised before they are added."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.group_relative.group_baselines import group_normalized
from jaxrl_llm.ranges import NonNegative, ranged

DecoupledScale = Literal["batch", "none"]


@ranged
def decoupled_normalized(
    reward_components: Float[Array, "B K"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    weights: tuple[float, ...] | None = None,
    scale: DecoupledScale = "batch",
    eps: NonNegative = 1e-4,
) -> Float[Array, "B"]:
    """Each reward is normalised within its group; their weighted sum is then normalised over the batch.

        a_k = (r_k - mean_group r_k) / (std_group r_k + eps)
        S = sum_k weights_k * a_k
        A = (S - mean_batch S) / (std_batch S + eps)

    Normalising the sum of the rewards, as GRPO does, can give equal advantages to answers that satisfy different
    numbers of rewards; here their advantages differ. A reward that is constant in a group adds exactly 0. A missing
    reward (NaN or infinite) adds 0 and enters no mean or deviation. One reward is plain GRPO, without the normalisation
    over the batch.

    `scale: none` followed by `whitened` is the released variant that whitens over tokens.

    Args:
      reward_components: one column per reward function.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      weights: one factor per column; 0 leaves a column out, None is 1 for each.
      scale: "none" leaves out the last line.
      eps: added to the unbiased deviations (1e-6 in the authors' other release).

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for an unknown scale, or if there is not one weight per column.

    Reference: GDPO (2601.05242).
    Certainty: verified
    """
    chex.assert_rank([reward_components, group, weight], [2, 1, 1])
    if scale not in get_args(DecoupledScale):
        raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(get_args(DecoupledScale))}")
    columns = reward_components.shape[1]
    factors = (1.0,) * columns if weights is None else tuple(weights)
    if len(factors) != columns:
        raise ValueError(
            f"weights is {factors}, {len(factors)} numbers, but there are {columns} reward components; give one weight "
            "for each reward function"
        )
    used = [k for k in range(columns) if factors[k] != 0]
    total = jnp.zeros(group.shape, jnp.float32)
    for k in used:
        column = reward_components[:, k].astype(jnp.float32)
        known = jnp.where(jnp.isfinite(column), weight.astype(jnp.float32), 0.0)
        total = total + factors[k] * group_normalized(column, group, known, eps=eps)
    if scale == "none" or len(used) == 1:
        return total
    return group_normalized(total, jnp.zeros_like(group), weight, eps=eps)
