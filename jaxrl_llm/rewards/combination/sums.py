"""Weighted sums of named rewards: with bounds, with annealed weights, and over an ensemble of scorers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, Natural, NonNegative, Share, ranged
from jaxrl_llm.rewards.combination.columns import named_columns

EnsembleForm = Literal["mean", "median", "least", "variance", "deviation"]


@ranged
def floored_sum(
    reward_components: Float[Array, "B K"],
    *,
    weights: Mapping[str, float],
    reward_names: tuple[str, ...],
    floors: Mapping[str, float] | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Float[Array, "B"]:
    """A weighted sum whose terms and total are bounded, so that no penalty dominates.

        r = clip(sum_k weights_k * max(x_k, floors_k), least, most)

    A penalty much larger than the bonus makes the policy avoid the whole class of answers; the floor prevents it.

    Args:
      reward_components: x, one column per reward function; NaN does not apply and is left out.
      weights: factor of each reward that counts, by name.
      reward_names: names of the columns in their order; filled from the run.
      floors: least value of a reward, by name; others have none.
      least, most: bounds of the sum; None is no bound.

    Returns:
      One reward per row, float32; NaN where none applies.

    Raises:
      ValueError: for a name that no column has, or a floor without a weight.

    Reference: multi-component reward of job applications, from its abstract; floors and bounds are our choice.
    Certainty: recalled
    """
    if unknown := sorted((floors or {}).keys() - weights.keys()):
        raise ValueError(f"floors names {unknown[0]!r}, which has no weight; give it one in weights")
    columns = named_columns(reward_components, reward_names, tuple(weights))
    bounded = [jnp.maximum(x, (floors or {}).get(name, -jnp.inf)) for name, x in zip(weights, columns, strict=True)]
    return jnp.clip(_weighted(bounded, list(weights.values())), least, most)


@ranged
def annealed_sum(
    reward_components: Float[Array, "B K"],
    step: Int[Array, ""],
    *,
    first: Mapping[str, float],
    last: Mapping[str, float],
    total_steps: Count,
    reward_names: tuple[str, ...],
    hold_steps: Natural = 0,
) -> Float[Array, "B"]:
    """A weighted sum whose weights move from one set to another over training.

        s = clip((step - hold_steps) / (total_steps - hold_steps), 0, 1)
        r = sum_k ((1 - s) * first_k + s * last_k) * x_k

    Args:
      reward_components: x, one column per reward function; NaN does not apply and is left out.
      step: updates so far.
      first, last: initial and final factors, by name; a missing name has factor 0.
      total_steps: step at which the last weights are reached.
      reward_names: names of the columns in their order; filled from the run.
      hold_steps: steps with the first weights.

    Returns:
      One reward per row, float32; NaN where none applies.

    Raises:
      ValueError: for a name that no column has, or hold_steps not below total_steps.
    """
    if hold_steps >= total_steps:
        raise ValueError(f"hold_steps is {hold_steps}; it must be below total_steps, which is {total_steps}")
    names = tuple(dict.fromkeys((*first, *last)))
    s = jnp.clip((step.astype(jnp.float32) - hold_steps) / (total_steps - hold_steps), 0.0, 1.0)
    weights = [(1 - s) * first.get(name, 0.0) + s * last.get(name, 0.0) for name in names]
    return _weighted(named_columns(reward_components, reward_names, names), weights)


@ranged
def blended_rewards(rewards: Float[Array, "B"], quality: Float[Array, "B"], *, share: Share = 0.5) -> Float[Array, "B"]:
    """Convex combination of rewards and another score, such as a shaped one.

        r <- (1 - share) * r + share * s

    Args:
      rewards: r; NaN does not apply.
      quality: s; where it is NaN the reward is unchanged.
      share: weight of the score.

    Returns:
      One reward per row, float32; NaN where the row has no reward.

    Reference: adaptive semantic reward, ARMed (2508.12957), with a share of 1/2.
    Certainty: reconstructed
    """
    chex.assert_equal_shape([rewards, quality])
    r, s = rewards.astype(jnp.float32), quality.astype(jnp.float32)
    return jnp.where(jnp.isnan(s), r, (1 - share) * r + share * s)


@ranged
def ensemble_score(
    reward_components: Float[Array, "B K"],
    *,
    heads: tuple[str, ...],
    reward_names: tuple[str, ...],
    form: EnsembleForm = "least",
    coefficient: NonNegative = 0.1,
    ddof: Natural = 1,
) -> Float[Array, "B"]:
    """Aggregated score of several scorers, with a penalty on their disagreement.

        mean        mean_k x_k
        median      median_k x_k
        least       min_k x_k
        variance    mean_k x_k - coefficient * var_k x_k
        deviation   mean_k x_k - coefficient * std_k x_k

    Args:
      reward_components: x, one column per reward function; NaN does not apply and is left out.
      heads: names of the scorers.
      reward_names: names of the columns in their order; filled from the run.
      form: which of the five.
      coefficient: weight of the disagreement: 0.1 for policy gradients, 0.5 for best-of-n.
      ddof: 1 for the unbiased variance, 0 for the population's, which best-of-n uses.

    Returns:
      One reward per row, float32; NaN where no scorer applies.

    Raises:
      ValueError: for a name that no column has, or an unknown form.

    Reference: reward model ensembles (2310.02743).
    Certainty: verified
    """
    if form not in get_args(EnsembleForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(EnsembleForm))}")
    scores = jnp.stack(named_columns(reward_components, reward_names, heads), axis=1)
    known = ~jnp.isnan(scores)
    count = known.sum(axis=1)
    mean = jnp.where(known, scores, 0.0).sum(axis=1) / jnp.maximum(count, 1)
    squares = jnp.where(known, jnp.square(scores - mean[:, None]), 0.0).sum(axis=1)
    variance = squares / jnp.maximum(count - ddof, 1)
    spread = {"mean": 0.0, "variance": variance, "deviation": jnp.sqrt(variance)}.get(form, 0.0)
    if form == "median":
        value = jnp.nanmedian(scores, axis=1)
    else:
        value = jnp.where(known, scores, jnp.inf).min(axis=1) if form == "least" else mean - coefficient * spread
    return jnp.where(count > 0, value, jnp.nan)


def _weighted(columns: list[Array], weights: list) -> Float[Array, "B"]:
    """Sum of weighted columns without NaN entries; NaN where all entries are NaN."""
    stacked = jnp.stack(columns, axis=1)
    factors = jnp.stack([jnp.asarray(factor, jnp.float32) for factor in weights])
    lacks = jnp.isnan(stacked)
    return jnp.where(lacks.all(axis=1), jnp.nan, jnp.where(lacks, 0.0, stacked * factors).sum(axis=1))
