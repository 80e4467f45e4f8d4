"""Credit for the best of k samples, so that training raises pass@k and not only pass@1.

Every function counts the present rows of a group as its n samples; other values of their weights have no effect. Where
a group has fewer than k samples, k is their number.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, NonNegative, ranged
from jaxrl_llm.statistics import group_min, group_rank, group_size, group_std, group_sum, present

MarginScale = Literal["group", "none"]


@ranged
def pass_at_k_normalized(
    correct: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, k: Count = 4
) -> Float[Array, "B"]:
    """Mean normalised reward of the k-subsets that hold the sample, a subset's reward being 1 if any of it is correct.

    With n samples of which c correct, w = n - c wrong:

        mean = 1 - C(w, k) / C(n, k),   std = sqrt(mean * (1 - mean))
        A_correct = (1 - mean) / std
        A_wrong = (1 - mean - C(w - 1, k - 1) / C(n - 1, k - 1)) / std

    The advantages of a group sum to 0, and are 0 where all or none of its subsets succeed. k = 1 is GRPO with the
    population's deviation.

    Args:
      correct: above 0 in rows whose answer is right.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      k: size of the subsets.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for k below 1.

    Reference: Pass@k training (2508.10751).
    Certainty: verified
    """
    there = (weight > 0).astype(jnp.float32)
    solved = present(correct, weight) > 0
    n = group_size(group, weight).astype(jnp.float32)
    wrong = n - group_sum(solved.astype(jnp.float32), group, there)
    size = jnp.minimum(float(k), n)
    failing = _choose_ratio(wrong, n, size, k)
    failing_with_row = _choose_ratio(wrong - 1, n - 1, size - 1, k - 1)
    variance = failing * (1 - failing)
    std = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    advantages = jnp.where(solved, failing, failing - failing_with_row) / std
    return present(jnp.where(variance > 0, advantages, 0.0), weight)


@ranged
def max_at_k_weights(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    k: Count = 4,
    baseline: bool = True,
) -> Float[Array, "B"]:
    """Weights whose sum over the group with grad log pi is an unbiased gradient of E[max reward of k samples].

        s_i = sum over k-subsets I holding i of (max_I r - [max of I without i]) / C(n, k)

    The bracket, 0 for k = 1, is a leave-one-out baseline. A loss that averages over rows scales the gradient by 1 / n.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      k: size of the subsets.
      baseline: whether the bracket is subtracted; it lowers the variance and changes no expectation.

    Returns:
      One weight per row, 0 in absent rows.

    Raises:
      ValueError: for k below 1.

    Reference: Pass@k policy optimisation (2505.15201).
    Certainty: verified
    """
    rewards = present(rewards, weight)
    n = group_size(group, weight).astype(jnp.float32)
    rank = group_rank(rewards, group, weight).astype(jnp.float32)
    size = jnp.minimum(float(k), n)
    # Probabilities that a random k-subset holds the row, or the row and a given other one.
    one = size / jnp.maximum(n, 1.0)
    pair = one * (size - 1) / jnp.maximum(n - 1, 1.0)
    if baseline:
        # Row j, ranked below row i, is the best of the others in C(rank_j, k - 2) of C(n - 2, k - 2) subsets.
        # Measured from the smallest reward, so that the margins of equal rewards are exactly 0.
        above_least = rewards - group_min(rewards, group, weight)
        best = _choose_ratio(rank, n - 2, size - 2, k - 2)
        below = _sums_below(jnp.stack([best, best * above_least], axis=1), rewards, group, weight)
        margins = pair * (above_least * below[:, 0] - below[:, 1])
        # A subset of one has no others: their maximum is 0.
        return present(jnp.where(size == 1, one * rewards, margins), weight)
    # The row is the best of C(rank, k - 1) subsets, and in C(rank_j - 1, k - 2) of them row j, ranked above, is.
    best = one * _choose_ratio(rank, n - 1, size - 1, k - 1) * rewards
    term = _choose_ratio(rank - 1, n - 2, size - 2, k - 2) * rewards
    there = (weight > 0).astype(jnp.float32)
    above = group_sum(term, group, there) - _sums_below(term[:, None], rewards, group, weight)[:, 0] - term
    return present(best + pair * above, weight)


@ranged
def top_margin(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    scale: MarginScale = "group",
    eps: NonNegative = 1e-6,
) -> Float[Array, "B"]:
    """The best sample of a group gets its lead over the second best, others 0: pass@k credit with k the group's size.

        A_best = (r_(1) - r_(2)) / (std_group + eps),   A = 0 elsewhere

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      scale: "none" leaves out the division.
      eps: added to the unbiased deviation, in units of reward.

    Returns:
      One advantage per row; 0 in absent rows and in groups of one.

    Raises:
      ValueError: for an unknown scale.

    Reference: Inference-time objectives (2503.19595), as implemented in verl.
    Certainty: verified
    """
    if scale not in get_args(MarginScale):
        raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(get_args(MarginScale))}")
    there = (weight > 0).astype(jnp.float32)
    n = group_size(group, weight)
    rank = group_rank(rewards, group, weight)
    second = group_sum(jnp.where(rank == n - 2, present(rewards, weight), 0.0), group, there)
    margin = jnp.where((rank == n - 1) & (n > 1), rewards.astype(jnp.float32) - second, 0.0)
    if scale == "group":
        margin = margin / (group_std(rewards, group, there) + eps)
    return present(margin, weight)


def _choose_ratio(a, b, size, most: int):
    """C(a, size) / C(b, size) for size <= most, 0 where a < size; a product, since factorials overflow float32."""
    ratio = jnp.ones_like(a)
    for i in range(most):
        factor = jnp.maximum(a - i, 0.0) / jnp.maximum(b - i, 1.0)
        ratio = ratio * jnp.where(i < size, factor, 1.0)
    return ratio


def _sums_below(terms, rewards, group, weight):
    """For each column of `terms` [B, C], the sum over the present rows of the group that rank below the row."""
    order = jnp.lexsort((rewards, weight <= 0, group))
    terms = jnp.where(weight[:, None] > 0, terms, 0.0)[order]
    first = jnp.concatenate([jnp.ones(1, bool), group[order][1:] != group[order][:-1]])[:, None]

    def combine(left, right):
        (left_sum, left_first), (right_sum, right_first) = left, right
        return jnp.where(right_first, right_sum, left_sum + right_sum), left_first | right_first

    # Segmented: a plain cumulative sum over the batch would cancel digits between groups.
    running, _ = jax.lax.associative_scan(combine, (terms, first))
    return jnp.zeros_like(terms).at[order].set(running - terms)
