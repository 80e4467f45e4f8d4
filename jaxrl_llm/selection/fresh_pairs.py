"""Pairs out of a group of fresh samples: who is the better and who the worse answer, for the field `preferred`."""

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
    """The best samples of a group against its worst: the pairs of online and iterative preference losses.

        preferred = 1 for the `count` highest rewards, 0 for the `count` lowest, -1 between

    Of equal rewards the first row is the better one. A group makes no pair where best and worst are at most `least_gap`
    apart, so equal rewards never do; with count 1 that is the margin of the pair, with a verifier's 0 and 1 a right and
    a wrong answer. All pairs of a group are those of count G // 2.

    Args:
      rewards: score of each row, of a reward model, a judge or a verifier; NaN makes no pair.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      count: better answers, and worse ones, of a group; at most half of it counts.
      least_gap: in units of reward.

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
    """One pair per prompt out of plain and guided attempts: a success with guidance against a failure without.

        preferred = 1 for the first guided success, else the first plain one;
                    0 for the first plain failure, else the first guided one;   -1 elsewhere

    A prompt without both makes no pair. The two stand behind the plain prompt, so a preference loss teaches what
    guidance brought about without showing the guidance.

    Args:
      rewards: a success has at least 1.
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
    """Samples that are good by themselves against those that are clearly worse than all of these.

        preferred = 1 where r >= least,  0 where r <= (smallest reward of those) - least_gap,  -1 between

    Every pair of a better and a worse answer of the group has at least that gap, so a group of 6, 5, 5, 3 of which 5 is
    good makes three pairs; the filter of DNO on an additive scale of 6 points would also take 6 against 5.

    Args:
      rewards: score of each row; NaN makes no pair.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      least: score of a good answer.
      least_gap: in units of reward.

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
    """How much better the better answers of a group are than its worse ones: the margin of fresh pairs.

        margin = mean reward of the better answers - mean reward of the worse ones

    Args:
      rewards: score of each row.
      group: id of the group each row belongs to.
      preferred: 1 for a better answer, 0 for a worse one.
      weight: weight of each row; 0 is absent.

    Returns:
      One entry per row, for the field `margin`, the same in a group; 0 where it has no pair.

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
    """Weights that keep samples as if the policy were already tilted by its rewards: RSO, one pass.

        kept where u < exp((r - max r of the group) / beta),   u uniform

    The best sample is always kept. What is kept is distributed like pi * exp(r / beta); beta near 0 is best-of-n, a
    large beta keeps all. Before `best_and_worst`, pairs come from the policy that the loss has as its optimum.

    Args:
      rewards: score of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      step: of training, part of the address of u.
      prompt_id: stable id of the prompt.
      sample: number of the sample within its group.
      beta: units of reward, that of the preference loss.

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
    """exp((r - max r of the group) / beta), how likely `rejection_sampled` keeps a row; 0 in absent rows.

    Reference: RSO (2309.06657).
    Certainty: recalled
    """
    present = (weight > 0) & ~jnp.isnan(rewards)
    r = jnp.where(present, rewards.astype(jnp.float32), 0.0)
    below = jnp.where(present, r - group_max(r, group, present), 0.0)
    return jnp.where(present, jnp.exp(below / beta), 0.0)
