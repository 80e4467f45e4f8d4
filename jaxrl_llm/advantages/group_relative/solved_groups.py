"""Length penalties for prompts that are solved often: credit functions that return `rewards`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Share, ranged
from jaxrl_llm.statistics import group_leader, group_mean, group_std, present


@ranged
def solved_group_length_penalty(
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    share: Share = 0.5,
    threshold: Share | None = None,
    alpha: Share = 0.2,
) -> Float[Array, "B"]:
    """1 for a correct answer, less for a long one where the prompt is among those solved most often.

        r = correct * (1 - alpha * sigmoid((length - m) / (s + 1e-6)))   in the groups that are penalised
        r = correct                                                      in the others

    m and s are the mean and the population's deviation of the lengths of the group's correct answers. Penalised are
    the floor(share * groups) groups with the highest share of correct answers (ties: the lower id), or with `threshold`
    those that reach it; never a group without a correct answer. A penalty on every group would shorten answers that are
    not right yet.

    The paper's text was not at hand: the penalty's form, alpha and the share are our reading of its abstract.

    Args:
      correct: above 0 in rows whose answer is right.
      length: completion tokens of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      share: share of the groups of the batch that is penalised, in [0, 1].
      threshold: penalise groups with at least this share of correct answers instead; None ranks them.
      alpha: the largest penalty, in [0, 1].

    Returns:
      One reward per row, 0 in absent rows.

    Raises:
      ValueError: for a share, threshold or alpha outside [0, 1].

    Reference: GRPO-lambda (2505.18086).
    Certainty: reconstructed
    """
    right = (present(correct, weight) > 0).astype(jnp.float32)
    ratio = group_mean(right, group, weight)
    if threshold is None:
        leader = group_leader(group, weight)
        # One entry per group, at its id; ids without rows sort last.
        by_id = jax.ops.segment_max(jnp.where(leader > 0, ratio, -1.0), group, num_segments=len(group))
        by_id = jnp.maximum(by_id, -1.0)
        best_first = jnp.argsort(-by_id, stable=True)
        place = jnp.zeros_like(group).at[best_first].set(jnp.arange(len(group), dtype=group.dtype))[group]
        # The slack keeps an exact product from being rounded down.
        penalized = place < jnp.floor(share * leader.sum() + 1e-4)
    else:
        penalized = ratio >= threshold
    tokens = length.astype(jnp.float32)
    answers = weight.astype(jnp.float32) * right
    mean, std = group_mean(tokens, group, answers), group_std(tokens, group, answers, ddof=0)
    penalty = alpha * jax.nn.sigmoid((tokens - mean) / (std + 1e-6))
    return present(right * jnp.where(penalized & (ratio > 0), 1 - penalty, 1.0), weight)
