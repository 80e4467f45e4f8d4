"""Length rewards conditional on correctness."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, Natural, NonNegative, Share, ranged
from jaxrl_llm.statistics import group_min, group_sum
from jaxrl_llm.token_codes import SEEDS, ngram_codes

TargetForm = Literal["exact", "most", "released"]


@ranged
def cosine_length(
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    *,
    max_completion_tokens: Count,
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    exceeded: float | None = None,
) -> Float[Array, "B"]:
    """A reward along half a cosine of the length: decreasing for right answers, increasing for wrong ones.

        w = (1 + cos(pi * min(length / L, 1))) / 2,   L = max_completion_tokens
        right   right_long + (right_short - right_long) * w
        wrong   wrong_long + (wrong_short - wrong_long) * w

    Args:
      correct: 1 for a right answer, 0 for a wrong one; NaN does not apply.
      length: completion tokens.
      max_completion_tokens: the length limit L.
      right_short, right_long, wrong_short, wrong_long: rewards at length 0 and L; the authors have 1, 0, -1, 0, the
        defaults are those of a library.
      exceeded: the reward of a completion of L tokens or more; None keeps the cosine.

    Returns:
      One reward per row, float32; NaN where `correct` is NaN.

    Reference: Demystifying long chain-of-thought (2502.03373).
    Certainty: verified
    """
    chex.assert_rank([correct, length], 1)
    chex.assert_equal_shape([correct, length])
    share = length.astype(jnp.float32) / max_completion_tokens
    w = (1 + jnp.cos(jnp.pi * jnp.minimum(share, 1.0))) / 2
    right = right_long + (right_short - right_long) * w
    reward = jnp.where(correct > 0, right, wrong_long + (wrong_short - wrong_long) * w)
    reward = reward if exceeded is None else jnp.where(share >= 1, exceeded, reward)
    return jnp.where(jnp.isnan(correct.astype(jnp.float32)), jnp.nan, reward)


@ranged
def repetition_penalty(
    tokens: Int[Array, "B T"], length: Int[Array, "B"], *, ngram: Count = 3, penalty: NonNegative = 1.0
) -> Float[Array, "B"]:
    """A penalty on repeated n-grams.

        r = -penalty * (1 - distinct n-grams / n-grams)

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence; later tokens are ignored.
      ngram: n; the authors have 20.
      penalty: largest penalty.

    Returns:
      One reward per row in [-penalty, 0]; 0 for fewer than n tokens. N-grams are compared by two 32-bit hashes.

    Reference: Demystifying long chain-of-thought (2502.03373).
    Certainty: verified
    """
    chex.assert_rank([tokens, length], [2, 1])
    chex.assert_equal_shape_prefix([tokens, length], 1)
    places = tokens.shape[1] - ngram + 1
    if places < 1:
        return jnp.zeros(tokens.shape[0], jnp.float32)
    there = jnp.arange(places)[None, :] < (length - ngram + 1)[:, None]
    hashes = [ngram_codes(tokens, ngram, seed=seed) for seed in SEEDS]
    # Absent n-grams sort last; equal n-grams are then adjacent.
    order = jax.vmap(lambda *keys: jnp.lexsort(keys))(hashes[1], hashes[0], ~there)
    one, other, counted = (jnp.take_along_axis(value, order, axis=1) for value in (*hashes, there))
    new = jnp.concatenate(
        [jnp.ones_like(there[:, :1]), (one[:, 1:] != one[:, :-1]) | (other[:, 1:] != other[:, :-1])], axis=1
    )
    count, distinct = there.sum(axis=1), (new & counted).sum(axis=1)
    return jnp.where(count > 0, penalty * (distinct / jnp.maximum(count, 1) - 1.0), 0.0)


@ranged
def target_length(
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    budget: Float[Array, "B"],
    *,
    form: TargetForm = "exact",
    alpha: NonNegative = 3e-4,
    delta: Share = 0.5,
) -> Float[Array, "B"]:
    """Rewards for right answers near the length that the prompt requests.

        exact      correct - alpha * |budget - length|
        most       correct * clip(alpha * (budget - length) + delta, 0, 1)
        released   correct * (clip(alpha * (budget - length), -1, 1) + 1) / 2

    Args:
      correct: 1 for a right answer, 0 for a wrong one; NaN does not apply.
      length: completion tokens.
      budget: requested, or largest, number of tokens.
      form: 'exact', or an upper limit as in the paper ('most') or in its code ('released').
      alpha: reward per token; the paper's 3e-4 is for budgets up to 4000, use larger values for smaller budgets.
      delta: share of the reward at the budget, for `most`.

    Returns:
      One reward per row, float32; NaN where `correct` is NaN.

    Raises:
      ValueError: for an unknown form.

    Reference: L1 (2503.04697).
    Certainty: verified
    """
    chex.assert_rank([correct, length, budget], 1)
    chex.assert_equal_shape([correct, length, budget])
    if form not in get_args(TargetForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(TargetForm))}")
    right, left = correct.astype(jnp.float32), budget.astype(jnp.float32) - length.astype(jnp.float32)
    if form == "exact":
        return right - alpha * jnp.abs(left)
    if form == "most":
        return right * jnp.clip(alpha * left + delta, 0.0, 1.0)
    return right * (jnp.clip(alpha * left, -1.0, 1.0) + 1) / 2


@ranged
def length_band_bonus(
    rewards: Float[Array, "B"],
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    least_tokens: Natural,
    most_tokens: Natural,
    bonus: NonNegative = 0.2,
) -> Float[Array, "B"]:
    """Rewards plus a bonus for right answers within a length band, in groups with more than one right answer.

        r + bonus * [correct] * [least_tokens <= length <= most_tokens] * [right answers of the group > 1]

    Args:
      rewards: rewards before the bonus.
      correct: 1 for a right answer.
      length: completion tokens.
      group: id of the group each row belongs to.
      weight: 0 for absent rows.
      least_tokens, most_tokens: the band, 320 and 512 in the paper.
      bonus: the bonus.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for least_tokens > most_tokens.

    Reference: VideoRFT (2505.12434).
    Certainty: verified
    """
    chex.assert_rank([rewards, correct, length, group, weight], 1)
    if least_tokens > most_tokens:
        raise ValueError(f"least_tokens is {least_tokens}; it must be at most most_tokens, which is {most_tokens}")
    right = correct > 0
    several = group_sum(right.astype(jnp.float32), group, (weight > 0).astype(jnp.float32)) > 1
    inside = (length >= least_tokens) & (length <= most_tokens)
    return rewards.astype(jnp.float32) + bonus * (right & several & inside)


@ranged
def shortest_right_bonus(
    rewards: Float[Array, "B"],
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    least_tokens: Natural = 100,
    bonus: NonNegative = 0.2,
) -> Float[Array, "B"]:
    """Rewards plus a bonus for the shortest right answer of each group above a minimal length.

        r + bonus * [the first of the shortest right answers] * [length > least_tokens]

    Groups without a right answer have no bonus; the authors' code gives it to their first sample.

    Args:
      rewards: rewards before the bonus.
      correct: 1 for a right answer.
      length: completion tokens.
      group: id of the group each row belongs to.
      weight: 0 for absent rows.
      least_tokens: answers up to this length get no bonus.
      bonus: the bonus.

    Returns:
      One reward per row, float32.

    Reference: Observe-R1 (2505.12432).
    Certainty: verified
    """
    chex.assert_rank([rewards, correct, length, group, weight], 1)
    right = jnp.where((weight > 0) & (correct > 0), 1.0, 0.0)
    tokens, rows = length.astype(jnp.float32), jnp.arange(len(length))
    shortest = (right > 0) & (tokens == group_min(tokens, group, right))
    first = rows == group_min(rows.astype(jnp.float32), group, shortest.astype(jnp.float32))
    return rewards.astype(jnp.float32) + bonus * (shortest & first & (length > least_tokens))
