"""Rewards that count only where another reward was earned, against farming of easy rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, NonNegative, Positive, Share, ranged
from jaxrl_llm.rewards.combination.columns import named_columns
from jaxrl_llm.statistics import group_mean, group_size

Gate = Literal["product", "positive"]


@ranged
def gated_sum(
    reward_components: Float[Array, "B K"],
    *,
    order: tuple[str, ...],
    reward_names: tuple[str, ...],
    thresholds: tuple[float, ...] | float = 0.0,
    weights: tuple[float, ...] | None = None,
) -> Float[Array, "B"]:
    """Rewards in order of priority: each counts where all rewards before it exceed their thresholds.

        open_1 = 1
        open_{k+1} = open_k * [x_k > threshold_k]
        r = sum_k weights_k * x_k * open_k

    Put the main outcome first and rewards that are easy to farm last.

    Args:
      reward_components: x, one column per reward function; NaN does not apply: it adds 0 and leaves the gate open.
      order: names of the rewards, the most important first.
      reward_names: names of the columns in their order; filled from the run.
      thresholds: of all rewards but the last, or one for each of them.
      weights: one factor a reward in `order`; None is 1 for each.

    Returns:
      One reward per row, float32; NaN where none of them applies.

    Raises:
      ValueError: for a name that no column has, or another number of thresholds or weights.

    Reference: G-RA (2508.10548).
    Certainty: verified
    """
    columns = named_columns(reward_components, reward_names, order)
    limits = (thresholds,) * (len(order) - 1) if isinstance(thresholds, (int, float)) else thresholds
    factors = (1.0,) * len(order) if weights is None else weights
    if len(limits) != len(order) - 1 or len(factors) != len(order):
        raise ValueError(
            f"order names {len(order)} rewards, but there are {len(limits)} thresholds and {len(factors)} weights; "
            "give one threshold for each but the last, and one weight for each"
        )
    total, opened = jnp.zeros_like(columns[0]), jnp.ones_like(columns[0], bool)
    for column, factor, limit in zip(columns, factors, (*limits, 0.0), strict=True):
        total = total + jnp.where(opened & ~jnp.isnan(column), factor * column, 0.0)
        opened &= ~(column <= limit)
    return jnp.where(jnp.isnan(jnp.stack(columns)).all(axis=0), jnp.nan, total)


@ranged
def outcome_gated_sum(
    reward_components: Float[Array, "B K"],
    *,
    outcome: str,
    gated: Mapping[str, float],
    plain: Mapping[str, float],
    reward_names: tuple[str, ...],
    gate: Gate = "product",
    limit: Positive | None = None,
) -> Float[Array, "B"]:
    """A sum of rewards, some of them multiplied by the outcome.

        r = sum_k plain_k * x_k + g * sum_j min(gated_j * max(x_j, 0), limit)
        product    g = o
        positive   g = [o > 0]

    A soft score, such as a judge's score of the thinking, then adds nothing to a wrong answer. Posterior-GRPO has
    outcome and format plain and the thinking gated; R1-Reward has the format plain with 1/2 and the consistency gated
    with 1/2; VideoRFT the gate `positive`, a similarity gated with 2, and the limit 1.

    Args:
      reward_components: x, one column per reward function; NaN does not apply and is left out.
      outcome: name of the reward o, the correctness of the answer.
      gated: factor of each reward that counts with the outcome.
      plain: factor of each reward that always counts; list the outcome here to include it.
      reward_names: names of the columns in their order; filled from the run.
      gate: factor g.
      limit: the most that a gated reward can add; None is none.

    Returns:
      One reward per row, float32; NaN where none of them applies. Where the outcome is NaN no gated reward counts.

    Raises:
      ValueError: for a name that no column has, or an unknown gate.

    Reference: Posterior-GRPO (2508.05170), R1-Reward (2505.02835), VideoRFT (2505.12434).
    Certainty: recalled
    """
    if gate not in get_args(Gate):
        raise ValueError(f"gate is {gate!r}; it must be one of {', '.join(get_args(Gate))}")
    names = (outcome, *plain, *gated)
    columns = dict(zip(names, named_columns(reward_components, reward_names, names), strict=True))
    known = {name: jnp.where(jnp.isnan(column), 0.0, column) for name, column in columns.items()}
    opening = known[outcome] if gate == "product" else (known[outcome] > 0).astype(jnp.float32)
    total = sum((factor * known[name] for name, factor in plain.items()), jnp.zeros_like(opening))
    for name, factor in gated.items():
        soft = factor * jnp.maximum(known[name], 0.0)
        total = total + opening * (soft if limit is None else jnp.minimum(soft, limit))
    return jnp.where(jnp.isnan(jnp.stack(list(columns.values()))).all(axis=0), jnp.nan, total)


@ranged
def trusted_sum(
    reward_components: Float[Array, "B K"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""],
    *,
    outcome: str,
    thinking: str,
    reward_names: tuple[str, ...],
    coefficient: NonNegative = 0.3,
    decay_steps: Positive = 500.0,
) -> Float[Array, "B"]:
    """The outcome plus a score of the thinking, weighted by the trust in that score within the group.

        r = o + coefficient * exp(-step / decay_steps) * trust * t
        trust = exp(min(mean_right - mean_wrong, 0))

    with mean_right and mean_wrong the mean scores t of samples with o of at least 0.5 and below, 0 without any. Where
    no sample is right the trust is 1; where all o are at least 0.9, or all at most 0.1, it is 0.

    Args:
      reward_components: one column per reward function.
      group: id of the group each row belongs to.
      weight: 0 for absent rows.
      step: updates so far; the weight of the thinking decays with it.
      outcome: name of the reward o in [0, 1]; NaN counts as 0.
      thinking: name of the score t in [0, 1]; NaN leaves the outcome alone.
      reward_names: names of the columns in their order; filled from the run.
      coefficient: largest weight of the thinking.
      decay_steps: steps in which that weight falls to 1/e.

    Returns:
      One reward per row, float32; NaN where neither applies.

    Raises:
      ValueError: for a name that no column has.

    Reference: SophiaVL-R1, Trust-GRPO (2505.17018).
    Certainty: verified
    """
    o, t = named_columns(reward_components, reward_names, (outcome, thinking))
    right, judged = jnp.where(jnp.isnan(o), 0.0, o), ~jnp.isnan(t)
    there = jnp.where(jnp.isnan(o) & ~judged, 0.0, weight.astype(jnp.float32))

    def share(condition: Array) -> Array:
        return group_mean(condition.astype(jnp.float32), group, there)

    score, counted = jnp.where(judged, t, 0.0), there * judged
    mean_right = group_mean(score, group, counted * (right >= 0.5))
    mean_wrong = group_mean(score, group, counted * (right < 0.5))
    none_right = group_size(group, there * (right >= 0.5)) == 0
    alike = (share(right >= 0.9) == 1) | (share(right <= 0.1) == 1)
    trust = jnp.where((mean_right >= mean_wrong) | none_right, 1.0, jnp.exp(jnp.minimum(mean_right - mean_wrong, 0.0)))
    factor = coefficient * jnp.exp(-step.astype(jnp.float32) / decay_steps) * jnp.where(alike, 0.0, trust)
    return jnp.where(jnp.isnan(o) & ~judged, jnp.nan, right + factor * score)


@ranged
def concise_correctness(
    correct: Float[Array, "B"],
    conciseness: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""],
    difficulty: Float[Array, "B"] | None = None,
    *,
    total_steps: Count,
    coefficient: NonNegative = 0.5,
) -> Float[Array, "B"]:
    """Right answers, worth more where they are short, on easy prompts and late in training; wrong ones are worth 0.

        r = o * (1 + coefficient * c * (s + d)),   s = min(step / total_steps, 1)

    An additive length penalty would also shorten the answers to unsolved prompts.

    Args:
      correct: o, 1 for a right answer.
      conciseness: c in [0, 1], from a scorer, or `length_conciseness`; NaN is no bonus.
      group: id of the group each row belongs to.
      weight: 0 for absent rows.
      step: updates so far.
      difficulty: d of the row's prompt; None takes the share of right answers in its group (our choice, as s is).
      total_steps: over which s rises.
      coefficient: alpha; above 1/2 a short right answer can outweigh two long ones.

    Returns:
      One reward per row, float32.

    Reference: CRM (2511.09158).
    Certainty: recalled
    """
    chex.assert_rank([correct, conciseness, group, weight], 1)
    chex.assert_equal_shape([correct, conciseness, group, weight])
    right, c = correct.astype(jnp.float32), conciseness.astype(jnp.float32)
    solved = group_mean(right, group, weight) if difficulty is None else difficulty.astype(jnp.float32)
    s = jnp.minimum(step.astype(jnp.float32) / total_steps, 1.0)
    return right * (1 + coefficient * jnp.where(jnp.isnan(c), 0.0, c) * (s + solved))


@ranged
def length_conciseness(
    length: Int[Array, "B"], *, max_completion_tokens: Count, least: Share = 0.1
) -> Float[Array, "B"]:
    """A conciseness score from the length alone, in place of a learned scorer.

        c = least + (1 - least) * (1 - length / L),   L = max_completion_tokens

    Args:
      length: completion tokens.
      max_completion_tokens: the length limit L.
      least: score of a completion of that length.

    Returns:
      One number per row in [least, 1], float32.

    Reference: CRM (2511.09158).
    Certainty: reconstructed
    """
    share = jnp.clip(length.astype(jnp.float32) / max_completion_tokens, 0.0, 1.0)
    return least + (1 - least) * (1 - share)
