"""Risk-averse advantages, from the lower tail of the scores on a bundle of prompts.

The j-th samples of the prompts of a bundle are a *paper*, as in an exam: its score S is the sum of their rewards. A
paper's advantage depends on the place of its score in the bundle's distribution and is distributed over its samples.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, NonNegative, Positive, Share, ranged
from jaxrl_llm.statistics import (
    group_leader,
    group_mean,
    group_min,
    group_rank,
    group_size,
    group_std,
    group_sum,
    present,
)

PaperCredit = Literal["uniform", "std", "sum_mean", "score"]
QuantileUse = Literal["tracked", "mix"]
LEAST_STD = 1e-3  # deviations up to this value are replaced by 1


class Papers(NamedTuple):
    """Scores of papers, one number per row: that of the row's own paper.

    Attributes:
      score: S, the sum of the rewards of the paper's samples; a prompt that has no j-th sample adds its mean reward.
      bundle: id of the bundle.
      paper: id of the paper.
      leader: 1 on one row of each paper, so that statistics of papers count each once.
    """

    score: Float[Array, "B"]
    bundle: Int[Array, "B"]
    paper: Int[Array, "B"]
    leader: Float[Array, "B"]


@ranged
def group_quantile(
    values: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, level: Share
) -> Float[Array, "B"]:
    """Quantile of the present rows of the row's group, linear between neighbours; all weights above 0 count alike."""
    last = group_size(group, weight) - 1
    rank = group_rank(values, group, weight)
    there = (weight > 0).astype(jnp.float32)
    position = level * last.astype(jnp.float32)
    below = jnp.floor(position).astype(rank.dtype)
    low, high = (
        group_sum(jnp.where(rank == place, present(values, weight), 0.0), group, there)
        for place in (below, jnp.minimum(below + 1, last))
    )
    return low + (position - below) * (high - low)


@ranged
def bundled_papers(
    rewards: Float[Array, "B"],
    sample: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    prompts_per_bundle: Count,
) -> Papers:
    """Bundle the present groups in order of their ids, `prompts_per_bundle` at a time, and score their papers."""
    there = (weight > 0).astype(jnp.float32)
    one_a_group = group_leader(group, weight)
    exists = jnp.zeros_like(group).at[group].max((weight > 0).astype(group.dtype))
    bundle = jnp.maximum(jnp.cumsum(exists)[group] - 1, 0) // prompts_per_bundle
    number = group_rank(sample.astype(jnp.float32), group, weight)
    order = jnp.lexsort((number, bundle))
    starts = (jnp.diff(bundle[order]) != 0) | (jnp.diff(number[order]) != 0)
    dense = jnp.concatenate([jnp.zeros(1, group.dtype), jnp.cumsum(starts.astype(group.dtype))])
    paper = jnp.zeros_like(group).at[order].set(dense)
    # Measured from each prompt's smallest reward: papers of equal rewards then have exactly equal scores.
    least = group_min(rewards, group, weight)
    spare = group_mean(rewards, group, weight) - least
    missing = group_sum(one_a_group, bundle, there) - group_size(paper, weight)
    of_missing = group_sum(spare * one_a_group, bundle, there) - group_sum(spare, paper, there)
    above = group_sum(rewards.astype(jnp.float32) - least, paper, there) + jnp.where(missing > 0, of_missing, 0.0)
    score = group_sum(least * one_a_group, bundle, there) + above
    return Papers(score, bundle, paper, group_leader(paper, weight))


@ranged
def tracked_quantile(
    quantile: Float[Array, ""],
    values: Float[Array, "B"],
    weight: Float[Array, "B"],
    *,
    level: Share,
    learning_rate: Positive = 0.1,
) -> Float[Array, ""]:
    """One step of stochastic approximation towards a quantile.

    q + learning_rate * (level - share of values below q)
    """
    weight = weight.astype(jnp.float32)
    total = weight.sum()
    below = present((values < quantile).astype(jnp.float32), weight) * weight
    share = below.sum() / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, quantile + learning_rate * (level - share), quantile)


@ranged
def mixed_value_at_risk(
    rewards: Float[Array, "B"],
    sample: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    prompts_per_bundle: Count = 5,
    lower: Share = 0.2,
    upper: Share = 0.8,
    tail_weight: NonNegative = 1.5,
    natural_baseline: bool = True,
    normalize: bool = True,
    credit: PaperCredit = "std",
) -> Float[Array, "B"]:
    """A mixture of two risk measures of the paper's score, credited to its samples.

    With q_d and q_u the quantiles of S in the bundle at levels lower and upper, and x^+ = max(x, 0):

        RVaR = ((S - q_d)^+ - (S - q_u)^+ - (q_u - q_d)) / (upper - lower + 1e-6)
        CVaR = -(q_d - S)^+ / (lower + 1e-6)
        a = (tail_weight * CVaR + RVaR) / (tail_weight + 1)
        a <- a / (std(S) + 1e-6)    with `normalize`, the deviation unbiased

    and to a sample of reward r, with d = r - mean_group r:

        uniform    A = a
        std        A = a / (std_group r + 1e-6), the deviation taken as 1 where it is at most 1e-3
        sum_mean   A = a * d / (sum of d over the paper), or a / (prompts of the bundle) where that sum vanishes
        score      A = 0.5 * a where r > 0, 1.5 * a elsewhere

    The term q_u - q_d is the natural baseline: with it no advantage is positive under uniform, std and score; the best
    papers have 0. A bundle of equal scores has 0 throughout. Bundles are formed of the present groups in order of their
    ids. A paper that lacks a sample of a prompt (ragged groups) is scored as if that sample had the prompt's mean.

    Args:
      rewards: total reward of each row.
      sample: number of the sample within its group; the order within the group decides the paper.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent. Fractions enter only the means and deviations of groups.
      prompts_per_bundle: prompts of a bundle; the last may have fewer.
      lower: level of the lower quantile.
      upper: level of the upper quantile (0.9 for easy prompts).
      tail_weight: weight of CVaR relative to RVaR.
      natural_baseline: whether the term q_u - q_d is subtracted (off for hard prompts).
      normalize: whether a is divided by the deviation of the scores, taken as 1 where it is 0.
      credit: how a paper's advantage is distributed over its samples ("std" for MATH, "sum_mean" for DAPO-Math).

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for levels that are not 0 <= lower < upper <= 1, an unknown credit, an empty bundle or a negative
        tail weight.

    Reference: RiskPO (2510.00911).
    Certainty: verified
    """
    _check(lower, upper, credit)
    papers = bundled_papers(rewards, sample, group, weight, prompts_per_bundle=prompts_per_bundle)
    q_d, q_u = (group_quantile(papers.score, papers.bundle, papers.leader, level=b) for b in (lower, upper))
    risk = _risk(papers, q_d, q_u, lower, upper, tail_weight, natural_baseline, normalize, least_std=0.0)
    return _credited(risk, papers, rewards, group, weight, credit)


@ranged
def tracked_mixed_value_at_risk(
    *,
    learning_rate: Positive = 0.1,
    use: QuantileUse = "tracked",
    prompts_per_bundle: Count = 5,
    lower: Share = 0.2,
    upper: Share = 0.8,
    tail_weight: NonNegative = 1.5,
    natural_baseline: bool = True,
    normalize: bool = True,
    credit: PaperCredit = "std",
) -> Method:
    """`mixed_value_at_risk` with quantiles that follow the scores of all earlier batches.

        after each batch:  q <- q + learning_rate * (level - share of papers with S < q)

    Quantiles of a few papers are noisy. The first batch uses its own quantiles, and tracking starts at their mean over
    its bundles. In the released trainer the tracked values are stored after they would have been used and never reach
    an advantage; here they do. Incomplete bundles have smaller scores and would disturb the quantiles, so the prompts
    of a step should be a multiple of `prompts_per_bundle`. A bundle of equal scores may lie far from tracked quantiles;
    its deviation, like any up to 1e-3, is taken as 1.

    Args:
      learning_rate: step of the tracking, in units of score.
      use: "mix" takes the mean of the tracked quantile and the bundle's own.
      prompts_per_bundle, lower, upper, tail_weight, natural_baseline, normalize, credit: as for `mixed_value_at_risk`.

    Returns:
      A method that remembers two quantiles; its update gives one advantage per row, 0 in absent rows.

    Raises:
      ValueError: as `mixed_value_at_risk`, for an unknown use, or a learning rate that is not positive.

    Reference: RiskPO (2510.00911).
    Certainty: verified
    """
    _check(lower, upper, credit)
    if use not in get_args(QuantileUse):
        raise ValueError(f"use is {use!r}; it must be one of {', '.join(get_args(QuantileUse))}")
    levels = {"lower": lower, "upper": upper}

    def init():
        return {"lower": jnp.float32(0), "upper": jnp.float32(0), "seen": jnp.float32(0)}

    def update(
        memory,
        rewards: Float[Array, "B"],
        sample: Int[Array, "B"],
        group: Int[Array, "B"],
        weight: Float[Array, "B"],
    ):
        papers = bundled_papers(rewards, sample, group, weight, prompts_per_bundle=prompts_per_bundle)
        one_a_bundle = group_leader(papers.bundle, papers.leader)
        past, used, new = memory["seen"] > 0, {}, {}
        for name, level in levels.items():
            own = group_quantile(papers.score, papers.bundle, papers.leader, level=level)
            followed = 0.5 * (memory[name] + own) if use == "mix" else jnp.broadcast_to(memory[name], own.shape)
            used[name] = jnp.where(past, followed, own)
            mean = (present(own, weight) * one_a_bundle).sum() / jnp.maximum(one_a_bundle.sum(), 1.0)
            start = jnp.where(past, memory[name], mean)
            new[name] = tracked_quantile(start, papers.score, papers.leader, level=level, learning_rate=learning_rate)
        new["seen"] = jnp.maximum(memory["seen"], jnp.any(weight > 0).astype(jnp.float32))
        q_d, q_u = used["lower"], used["upper"]
        risk = _risk(papers, q_d, q_u, lower, upper, tail_weight, natural_baseline, normalize, least_std=LEAST_STD)
        return _credited(risk, papers, rewards, group, weight, credit), new

    return Method(init, update)


def _risk(papers, q_d, q_u, lower, upper, tail_weight, natural_baseline, normalize, *, least_std):
    score = papers.score
    between = jnp.maximum(score - q_d, 0.0) - jnp.maximum(score - q_u, 0.0)
    if natural_baseline:
        between = between - (q_u - q_d)
    tail = -jnp.maximum(q_d - score, 0.0) / (lower + 1e-6)
    risk = (tail_weight * tail + between / (upper - lower + 1e-6)) / (tail_weight + 1)
    if normalize:
        std = group_std(score, papers.bundle, papers.leader)
        # Equal scores have risk 0 by their own quantiles, but not by quantiles of other batches.
        risk = risk / (jnp.where(std <= least_std, 1.0, std) + 1e-6)
    return risk


def _credited(risk, papers, rewards, group, weight, credit):
    rewards = rewards.astype(jnp.float32)
    there = (weight > 0).astype(jnp.float32)
    match credit:
        case "uniform":
            result = risk
        case "std":
            std = group_std(rewards, group, weight)
            result = risk / (jnp.where(std <= LEAST_STD, 1.0, std) + 1e-6)
        case "sum_mean":
            deviation = rewards - group_mean(rewards, group, weight)
            total = group_sum(deviation, papers.paper, there)
            vanishes = jnp.abs(total) <= 1e-6
            prompts = jnp.maximum(group_size(papers.paper, weight), 1)
            result = jnp.where(vanishes, risk / prompts, risk * deviation / jnp.where(vanishes, 1.0, total))
        case _:
            result = jnp.where(rewards > 0, 0.5 * risk, 1.5 * risk)
    return present(result, weight)


def _check(lower, upper, credit):
    if not 0 <= lower < upper <= 1:
        raise ValueError(f"lower is {lower} and upper is {upper}; they are levels with 0 <= lower < upper <= 1")
    if credit not in get_args(PaperCredit):
        raise ValueError(f"credit is {credit!r}; it must be one of {', '.join(get_args(PaperCredit))}")
