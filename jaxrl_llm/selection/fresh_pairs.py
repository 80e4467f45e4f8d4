"""Preference pairs from a group of fresh samples: labels for the field `preferred`."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged
from jaxrl_llm.selection.subsets import row_uniforms
from jaxrl_llm.statistics import group_max, group_mean, group_min, group_rank, group_size


@ranged
def best_and_worst(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    count: Count = 1,
    least_gap: NonNegative = 0.0,
) -> Float[Array, "B"]:
    """Pairs of the best and the worst samples of a group, for online and iterative preference losses.

        preferred = 1 for the `count` highest rewards, 0 for the `count` lowest, -1 between

    Of equal rewards the first row ranks higher. A group makes no pair if its highest and lowest reward differ by at
    most `least_gap`, so a group of equal rewards makes none. With count 1 that difference is the margin of the pair;
    with rewards of 0 and 1 a pair is a right and a wrong answer. Count G // 2 labels all rows of a group of even size.

    Args:
      rewards: score of each row, from a reward model, a judge or a verifier; rows of NaN are in no pair.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      count: number of better answers and of worse answers per group, at most half of its rows.
      least_gap: difference that the highest and lowest reward must exceed.

    Returns:
      One entry per row, for the field `preferred`; -1 in absent rows.

    Raises:
      ValueError: for a count below 1, or a negative gap.

    Reference: online DPO (2402.04792); iterative reasoning preference optimisation (2404.19733).
    Certainty: verified
    """
    chex.assert_equal_shape([rewards, group, weight])
    r = rewards.astype(jnp.float32)
    present = (weight > 0) & ~jnp.isnan(r)
    r = jnp.where(present, r, 0.0)
    rank = group_rank(-r, group, present)  # 0 for the best
    size = group_size(group, present)
    most = jnp.minimum(count, size // 2)
    apart = group_max(r, group, present) - group_min(r, group, present) > least_gap
    better, worse = rank < most, rank >= size - most
    return jnp.where(present & apart & (better | worse), jnp.where(better, 1.0, 0.0), -1.0)


def guided_pairs(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], branch: Float[Array, "B"]
) -> Float[Array, "B"]:
    """One pair per prompt from plain and guided attempts: preferably a guided success against a plain failure.

        preferred = 1 for the first guided success, else the first plain one;
                    0 for the first plain failure, else the first guided one;   -1 elsewhere

    A prompt without a success or without a failure makes no pair. Both rows have the plain prompt, so a preference loss
    trains the policy towards guided answers without the guidance in its input.

    Args:
      rewards: reward of each row; at least 1 is a success.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      branch: 1 for guided attempts.

    Returns:
      One entry per row, for the field `preferred`; -1 in rows that make no pair.

    Reference: Agent-RLVR (2506.11425).
    Certainty: reconstructed
    """
    chex.assert_equal_shape([rewards, group, weight, branch])
    there, place, count = weight > 0, jnp.arange(len(group)), len(group)
    passed = rewards >= 1

    def first(eligible, guided_first):
        late = count * ((branch > 0) != guided_first)
        order = jnp.where(there & eligible, place + late, 4 * count)
        least = jax.ops.segment_min(order, group, num_segments=count)[group]
        return (order == least) & (order < 4 * count), least < 4 * count

    better, any_better = first(passed, True)
    worse, any_worse = first(~passed, False)
    pair = any_better & any_worse
    return jnp.where(pair & better, 1.0, jnp.where(pair & worse, 0.0, -1.0))


@ranged
def by_threshold(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    least: float = 5.0,
    least_gap: NonNegative = 1.0,
) -> Float[Array, "B"]:
    """Pairs of samples above an absolute threshold and samples that are worse than all of these by a gap.

        preferred = 1 where r >= least,   0 where r <= min{r_j : r_j >= least} - least_gap,   -1 else

    Every pair of a better and a worse answer differs by at least `least_gap`: rewards 6, 5, 5, 3 with least 5 make
    three pairs. The filter of DNO, on an additive scale of 6 points, would also pair 6 with 5.

    Args:
      rewards: score of each row; rows of NaN are in no pair.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      least: smallest score of a better answer.
      least_gap: smallest difference of a pair, in units of reward.

    Returns:
      One entry per row, for the field `preferred`; -1 in absent rows.

    Raises:
      ValueError: for a negative gap.

    Reference: DNO (2404.03715).
    Certainty: reconstructed
    """
    chex.assert_equal_shape([rewards, group, weight])
    r = rewards.astype(jnp.float32)
    present = (weight > 0) & ~jnp.isnan(r)
    good = present & (r >= least)
    lowest = group_min(jnp.where(good, r, 0.0), group, good.astype(jnp.float32))
    some = group_size(group, good.astype(jnp.float32)) > 0
    bad = present & some & ~good & (r <= lowest - least_gap)
    return jnp.where(good, 1.0, jnp.where(bad, 0.0, -1.0))


def reward_gap(
    rewards: Float[Array, "B"], group: Int[Array, "B"], preferred: Float[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Margin of fresh pairs: the difference of mean rewards between the better and the worse answers of a group.

        margin = mean reward of the better answers - mean reward of the worse ones

    Args:
      rewards: score of each row.
      group: id of the group each row belongs to.
      preferred: 1 for a better answer, 0 for a worse one.
      weight: weight of each row; 0 is absent.

    Returns:
      One entry per row, for the field `margin`, equal within a group; 0 in groups without a pair.

    Reference: Secrets of RLHF II, adaptive margins (2401.06080), of rewards.
    Certainty: recalled
    """
    chex.assert_equal_shape([rewards, group, preferred, weight])
    r, known = jnp.nan_to_num(rewards.astype(jnp.float32)), (weight > 0) & ~jnp.isnan(rewards)
    better, worse = ((known & (preferred == kind)).astype(jnp.float32) for kind in (1, 0))
    both = (group_size(group, better) > 0) & (group_size(group, worse) > 0)
    return jnp.where(both, group_mean(r, group, better) - group_mean(r, group, worse), 0.0)


@ranged
def rejection_sampled(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""],
    prompt_id: Int[Array, "B"],
    sample: Int[Array, "B"],
    *,
    beta: Positive = 0.5,
) -> Float[Array, "B"]:
    """Weights by rejection sampling from the reward-tilted policy: RSO, one pass.

        kept where u < exp((r - max r of the group) / beta),   u uniform

    The best sample is always kept. Kept samples are distributed approximately like pi * exp(r / beta); beta near 0 is
    best-of-n, a large beta keeps all. Followed by `best_and_worst`, the pairs are sampled from the optimal policy of
    the loss.

    Args:
      rewards: score of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      step: updates made so far; u is a function of step, prompt and sample.
      prompt_id: stable id of the prompt.
      sample: number of the sample within its group.
      beta: temperature in units of reward; use the beta of the preference loss.

    Returns:
      The new weight of each row.

    Reference: RSO (2309.06657).
    Certainty: recalled
    """
    chex.assert_equal_shape([rewards, group, weight, prompt_id, sample])
    accepted = row_uniforms(step, prompt_id, sample) < acceptance_probability(rewards, group, weight, beta=beta)
    return jnp.where(accepted, weight, 0.0)


@ranged
def acceptance_probability(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, beta: Positive = 0.5
) -> Float[Array, "B"]:
    """Probability that `rejection_sampled` keeps each row: exp((r - max r of the group) / beta); 0 in absent rows.

    Reference: RSO (2309.06657).
    Certainty: recalled
    """
    present = (weight > 0) & ~jnp.isnan(rewards)
    r = jnp.where(present, rewards.astype(jnp.float32), 0.0)
    below = jnp.where(present, r - group_max(r, group, present), 0.0)
    return jnp.where(present, jnp.exp(below / beta), 0.0)
