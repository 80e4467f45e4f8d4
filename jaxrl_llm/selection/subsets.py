"""Subsets of the samples of a prompt to train on: credit functions that return a new `weight`.

They are placed after the advantages, which compare all samples. In random choices the random number of a row is a
function of step, prompt and sample, so it does not depend on the index of the row.
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import uniforms_at
from jaxrl_llm.ranges import NonNegative, Positive, ranged
from jaxrl_llm.statistics import group_max, group_mean, group_min, group_rank, group_size

RankRule = Literal["best_worst", "best_random", "best"]
BatchRule = Literal["max_min", "max_random", "power"]
Side = Literal["negatives", "both"]


def row_uniforms(step: Int[Array, ""] | int, prompt_id: Int[Array, "B"], sample: Int[Array, "B"]) -> Float[Array, "B"]:
    """A random number in [0, 1) for each row, a function of step, prompt and sample alone."""
    return uniforms_at(jax.random.key(0), step, prompt_id, sample)


def complete_samples(weight: Float[Array, "B"], truncated: Bool[Array, "B"]) -> Float[Array, "B"]:
    """Weights without samples that reached the length limit: overlong filtering.

    Placed after the advantages, truncated samples still count in the baselines of the others; placed before, they do
    not.

    Args:
      weight: weight of each row; 0 is absent.
      truncated: the completion reached its length limit before end of sequence.

    Returns:
      The new weight of each row.

    Reference: DAPO (2503.14476).
    Certainty: verified
    """
    chex.assert_equal_shape([weight, truncated])
    return jnp.where(truncated.astype(bool), 0.0, weight)


@ranged
def finished_in_window(
    durations: Float[Array, "B S"] | Float[Array, "B"],
    group: Int[Array, "B"],
    sample: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    window: Positive,
) -> Float[Array, "B"]:
    """Weights without samples that would not finish within a fixed time of collection.

        w_i <- w_i where sum_{j <= i} D_j <= window, else 0,    D_j = sum_s d_js

    over the samples j of the group of i in their order: each prompt is an actor that draws its samples in sequence, and
    an unfinished sample at the end of the window is cancelled. Placed before the advantages, cancelled samples do not
    count in baselines. Slow samples are cancelled more often; `duration_weights` corrects this bias.

    Args:
      durations: d, duration of each turn or of each row, in any unit.
      group: id of the group each row belongs to.
      sample: number of each row within its group.
      weight: weight of each row; 0 is absent and has duration 0.
      window: time of collection, in the unit of `durations`.

    Returns:
      The new weight of each row.

    Reference: RL for machine-learning engineering agents (2509.01684).
    Certainty: reconstructed
    """
    chex.assert_rank([durations, group, sample, weight], [{1, 2}, 1, 1, 1])
    chex.assert_equal_shape([group, sample, weight])
    order = jnp.lexsort((sample, group))
    took = jnp.where(weight > 0, durations.astype(jnp.float32).reshape(len(group), -1).sum(axis=1), 0.0)[order]
    starts = jnp.diff(group[order], prepend=-1) != 0

    def joined(before, after):
        return before[0] | after[0], jnp.where(after[0], after[1], before[1] + after[1])

    # Sums that start anew in each group: a sum over the batch would lose the digits of a short group.
    until = jax.lax.associative_scan(joined, (starts, took))[1]
    finished = jnp.zeros(len(group), bool).at[order].set(until <= window)
    return jnp.where(finished, weight, 0.0)


def extreme_samples(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, rule: RankRule = "best_worst"
) -> Float[Array, "B"]:
    """Weights that keep the samples of a group with a reliable reward: PF-PPO.

        best_worst    1 for the best and for the worst, 0 for the others
        best_random   1 for the best, 1 / (G - 1) for each other: the expectation of drawing one of them
        best          1 for the best

    A reward model errs less at the extremes of its range. Of equal rewards the first row is the best, the last the
    worst.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      rule: as above.

    Returns:
      The new weight of each row.

    Raises:
      ValueError: for an unknown rule.

    Reference: PF-PPO (2409.06957).
    Certainty: verified
    """
    best, worst = _best(rewards, group, weight), _worst(rewards, group, weight)
    match rule:
        case "best_worst":
            share = (best | worst).astype(jnp.float32)
        case "best_random":
            share = jnp.where(best, 1.0, 1.0 / jnp.maximum(group_size(group, weight) - 1, 1))
        case "best":
            share = best.astype(jnp.float32)
        case _:
            raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(get_args(RankRule))}")
    return _scaled(weight, share)


def best_and_random(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    prompt_id: Int[Array, "B"],
    sample: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""],
) -> Float[Array, "B"]:
    """Weights that keep the best sample of a group and one random other sample: PF-PPO as released.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      prompt_id: id of the prompt in its data set.
      sample: number of the sample within its group.
      weight: weight of each row; 0 is absent.
      step: updates made so far.

    Returns:
      The new weight of each row.

    Reference: PF-PPO (2409.06957).
    Certainty: verified
    """
    best = _best(rewards, group, weight)
    others = (weight > 0) & ~best
    drawn = _first_of(others, row_uniforms(step, prompt_id, sample), group, 1)
    return _scaled(weight, (best | drawn).astype(jnp.float32))


@ranged
def extreme_rewards(
    rewards: Float[Array, "B"], weight: Float[Array, "B"], *, rule: BatchRule = "max_min", exponent: NonNegative = 2.0
) -> Float[Array, "B"]:
    """Weights by the position of each reward in the range of the batch: the PF-PPO filter of verl.

        max_min      1 where the reward equals the largest or the smallest of the batch, else 0
        max_random   0.4 where it equals the largest, else 0.1
        power        |reward| ** exponent

    plus 1e-8. verl then resamples the batch with replacement in these proportions (`resampled`); without resampling the
    weights enter every average directly, which is the expectation over such draws.

    Args:
      rewards: total reward of each row.
      weight: weight of each row; 0 is absent.
      rule: as above.
      exponent: exponent of the rule `power`.

    Returns:
      The new weight of each row.

    Raises:
      ValueError: for an unknown rule or a negative exponent.

    Reference: PF-PPO (2409.06957) as ported by verl.
    Certainty: verified
    """
    chex.assert_rank([rewards, weight], 1)
    batch = jnp.zeros(rewards.shape, jnp.int32)
    rewards = rewards.astype(jnp.float32)
    top, bottom = rewards == group_max(rewards, batch, weight), rewards == group_min(rewards, batch, weight)
    match rule:
        case "max_min":
            share = (top | bottom).astype(jnp.float32)
        case "max_random":
            share = jnp.where(top, 0.4, 0.1)
        case "power":
            share = jnp.abs(rewards) ** exponent
        case _:
            raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(get_args(BatchRule))}")
    return _scaled(weight, share + 1e-8)


@ranged
def resampled(weight: Float[Array, "B"], step: Int[Array, ""], *, seed: int = 0) -> Float[Array, "B"]:
    """Count of each row in a resample with replacement, in proportion to the weights, of the size of the present batch.

    Args:
      weight: weight of each row; 0 is absent.
      step: updates made so far, part of the random key.
      seed: seed of the random key.

    Returns:
      The new weight of each row, a whole number.

    Reference: PF-PPO (2409.06957) as ported by verl.
    Certainty: verified
    """
    chex.assert_rank(weight, 1)
    weight = weight.astype(jnp.float32)
    rows = weight.shape[0]
    logits = jnp.where(weight > 0, jnp.log(jnp.where(weight > 0, weight, 1.0)), -jnp.inf)
    logits = jnp.where(jnp.any(weight > 0), logits, 0.0)
    drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), logits, shape=(rows,))
    counted = (jnp.arange(rows) < (weight > 0).sum()).astype(jnp.float32)
    return jnp.zeros(rows, jnp.float32).at[drawn].add(counted)


def one_success_one_failure(
    correct: Float[Array, "B"],
    group: Int[Array, "B"],
    prompt_id: Int[Array, "B"],
    sample: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""],
) -> Float[Array, "B"]:
    """Weights that keep one right and one wrong answer of each group, drawn at random; other groups get weight 0.

    Args:
      correct: 1 for a right answer, 0 for a wrong one.
      group: id of the group each row belongs to.
      prompt_id: id of the prompt in its data set.
      sample: number of the sample within its group.
      weight: weight of each row; 0 is absent.
      step: updates made so far.

    Returns:
      The new weight of each row.

    Reference: OREAL (2502.06781).
    Certainty: verified
    """
    right, wrong = (weight > 0) & (correct > 0), (weight > 0) & (correct <= 0)
    uniforms = row_uniforms(step, prompt_id, sample)
    drawn = _first_of(right, uniforms, group, 1) | _first_of(wrong, uniforms, group, 1)
    both = (_count(right, group) > 0) & (_count(wrong, group) > 0)
    return _scaled(weight, (drawn & both).astype(jnp.float32))


def balanced_groups(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    prompt_id: Int[Array, "B"],
    sample: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""],
    *,
    drop: Side = "negatives",
) -> Float[Array, "B"]:
    """Weights that drop, at random, the surplus of bad over good answers in each group.

    An answer is good if its reward is at least the mean of the group. Groups without good or without bad answers are
    unchanged. Unlike the other functions of this module it is placed before the advantages, whose baseline is the mean
    of the kept rows.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      prompt_id: id of the prompt in its data set.
      sample: number of the sample within its group.
      weight: weight of each row; 0 is absent.
      step: updates made so far.
      drop: 'negatives' drops a surplus of bad answers; 'both' also drops a surplus of good answers.

    Returns:
      The new weight of each row.

    Raises:
      ValueError: for an unknown `drop`.

    Reference: Group-relative REINFORCE off-policy (2509.24203).
    Certainty: verified
    """
    if drop not in get_args(Side):
        raise ValueError(f"drop is {drop!r}; it must be one of {', '.join(get_args(Side))}")
    good = (weight > 0) & (rewards.astype(jnp.float32) >= group_mean(rewards, group, weight))
    bad = (weight > 0) & ~good
    uniforms = row_uniforms(step, prompt_id, sample)
    goods, bads = _count(good, group), _count(bad, group)
    kept = _first_of(bad, uniforms, group, goods) | good
    if drop == "both":
        kept = _first_of(bad, uniforms, group, goods) | _first_of(good, uniforms, group, bads)
    one_kind = (goods == 0) | (bads == 0)
    return _scaled(weight, (kept | one_kind).astype(jnp.float32))


def squared_correlation(
    rewards: Float[Array, "B"], true_rewards: Float[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, ""]:
    """R^2 between two rewards over the kept rows; PF-PPO takes the rule of `extreme_samples` with the largest R^2.

    Args:
      rewards: reward used in training.
      true_rewards: score that `rewards` approximates.
      weight: weight of each row; 0 is absent.

    Returns:
      A number in [0, 1]; 0 if one of the two is constant.

    Reference: PF-PPO (2409.06957).
    Certainty: verified
    """
    chex.assert_rank([rewards, true_rewards, weight], 1)
    batch = jnp.zeros(rewards.shape, jnp.int32)
    weights = jnp.where(weight > 0, weight.astype(jnp.float32), 0.0)
    x, y = (
        jnp.where(weights > 0, r.astype(jnp.float32) - group_mean(r, batch, weights), 0.0)
        for r in (rewards, true_rewards)
    )
    product, xx, yy = (weights * x * y).sum(), (weights * x * x).sum(), (weights * y * y).sum()
    return jnp.where(xx * yy > 0, product**2 / jnp.where(xx * yy > 0, xx * yy, 1.0), 0.0)


def _best(rewards: Array, group: Array, weight: Array) -> Bool[Array, "B"]:
    rows = jnp.arange(len(group))
    candidate = (weight > 0) & (rewards.astype(jnp.float32) == group_max(rewards, group, weight))
    first = jax.ops.segment_min(jnp.where(candidate, rows, len(group)), group, num_segments=len(group))
    return rows == first[group]


def _worst(rewards: Array, group: Array, weight: Array) -> Bool[Array, "B"]:
    rows = jnp.arange(len(group))
    candidate = (weight > 0) & (rewards.astype(jnp.float32) == group_min(rewards, group, weight))
    last = jax.ops.segment_max(jnp.where(candidate, rows, -1), group, num_segments=len(group))
    return rows == last[group]


def _first_of(among: Array, uniforms: Array, group: Array, count: Array | int) -> Bool[Array, "B"]:
    """The `count` rows of the smallest random numbers among the given rows of each group."""
    return among & (group_rank(uniforms, group, among.astype(jnp.float32)) < count)


def _count(rows: Array, group: Array) -> Int[Array, "B"]:
    return group_size(group, rows.astype(jnp.float32))


def _scaled(weight: Array, share: Array) -> Float[Array, "B"]:
    return jnp.where(weight > 0, weight.astype(jnp.float32) * share, 0.0)
