"""Losses of networks that score steps, from returns or step labels."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.statistics import at_turns, behind_tokens

Reduce = Literal["mean", "sum"]


@ranged
def return_decomposition(
    progress_values: Float[Array, "B T"],
    progress_scores: Float[Array, "B"],
    rewards: Float[Array, "B"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    length: Int[Array, "B"],
    drawn_turns: Float[Array, "B S"] | None = None,
    *,
    max_turns: Count,
    reduce: Reduce = "mean",
    unbiased: bool = False,
) -> Loss:
    """Trains a network to predict each step's contribution from returns alone: the contributions sum to the return.

        sum    x = (sum_s c_s - R)^2
        mean   x = (sum_s c_s / n - R / n)^2

    averaged over rows, with c_s the output of the network `progress` after the last token of step s and n the number of
    steps taken. With sums long rows dominate. With sampled steps (`drawn_turns`) their mean estimates the mean over all
    steps; `unbiased` subtracts the sampling variance, with k the number sampled and v their variance:

        x - v * (1 - k / n) / k

    which may make the loss negative.

    Args:
      progress_values, progress_scores: output of the head before each token, and after the last one.
      rewards: R, the return of each row.
      turn: index of the step that each token belongs to.
      mask: 0 on tokens that do not count, the row's weight on those that do; a row without a step is left out.
      length: completion tokens including end of sequence.
      drawn_turns: 1 for the steps that are read (`selection.drawn_turns`); None reads all.
      max_turns: steps that are read, S; later steps contribute 0.
      reduce: as above; with `drawn_turns`, sums are n times the mean over the sampled steps.
      unbiased: with `drawn_turns`; no correction where a single step was sampled.

    Returns:
      The loss as a sum and a count of rows.

    Raises:
      ValueError: for an unknown reduce.

    Reference: LaRe (2412.11120), SPA-RL (2505.20732), randomized return decomposition (2111.13485).
    Certainty: verified
    """
    chex.assert_rank([progress_values, progress_scores, rewards, turn, mask, length], [2, 1, 1, 2, 2, 1])
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce is {reduce!r}; it must be one of {', '.join(get_args(Reduce))}")
    behind = behind_tokens(progress_values, progress_scores, length)
    found, taken = at_turns(behind, turn, mask, max_turns)
    read = taken if drawn_turns is None else taken & (drawn_turns > 0)
    n, k = (jnp.maximum(which.sum(1), 1).astype(jnp.float32) for which in (taken, read))
    mean = jnp.where(read, found, 0.0).sum(1) / k
    there = jnp.where(read.any(1), row_weight(mask.astype(jnp.float32)), 0.0)
    target = jnp.where(there > 0, jax.lax.stop_gradient(rewards.astype(jnp.float32)), 0.0) / n
    error = jnp.square(mean - target)
    if unbiased and drawn_turns is not None:
        spread = jnp.where(read, jnp.square(found - mean[:, None]), 0.0).sum(1) / jnp.maximum(k - 1, 1)
        error = error - spread * (1 - k / n) / k
    error = error * jnp.square(n) if reduce == "sum" else error
    return Loss((there * error).sum(), there.sum())


def step_label_likelihood(
    process_values: Float[Array, "B T"],
    process_scores: Float[Array, "B"],
    step_labels: Float[Array, "B T"],
    length: Int[Array, "B"],
    weight: Float[Array, "B"],
) -> Loss:
    """A process reward model: cross-entropy of the label of each step, read after the last token of the step.

        x = -y * log sigmoid(z) - (1 - y) * log sigmoid(-z)

    averaged over the labelled tokens of the batch, with z the output of the network `process` there. A head of two
    logits is equivalent with z their difference. Labels may be shares, such as those of `continuation_labels`.

    Args:
      process_values, process_scores: output of the head before each token, and after the last one.
      step_labels: y in [0, 1] on the last token of each step; NaN elsewhere.
      length: completion tokens including end of sequence.
      weight: weight of each row; 0 is absent.

    Returns:
      The loss as a sum and a count of labels. Metric: `right_share`, labels on the right side of 1/2.

    Reference: process reward models (2305.20050), Math-Shepherd (2312.08935).
    Certainty: verified
    """
    chex.assert_rank([process_values, process_scores, step_labels, length, weight], [2, 1, 2, 1, 1])
    inside = jnp.arange(step_labels.shape[1])[None, :] < length[:, None]
    labels = jnp.where(inside, step_labels.astype(jnp.float32), jnp.nan)
    counts = jnp.where(jnp.isnan(labels), 0.0, jnp.broadcast_to(weight[:, None], labels.shape).astype(jnp.float32))
    y = jnp.where(counts > 0, labels, 0.0)
    z = jnp.where(counts > 0, behind_tokens(process_values, process_scores, length).astype(jnp.float32), 0.0)
    loss = counts * (jax.nn.softplus(z) - y * z)
    right = counts * ((z > 0) == (y > 0.5))
    return Loss(loss.sum(), counts.sum(), {"right_share": (right.sum(), counts.sum())})
