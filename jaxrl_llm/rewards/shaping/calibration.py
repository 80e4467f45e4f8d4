"""Rewards for calibrated confidence."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, OpenShare, ranged

ScoringRule = Literal["brier", "log"]
Deviation = Literal["absolute", "squared"]


@ranged
def calibrated_correctness(
    correct: Float[Array, "B"],
    confidence: Float[Array, "B"],
    *,
    format_weight: NonNegative = 0.0,
    accuracy_weight: NonNegative = 1.0,
    calibration_weight: NonNegative = 1.0,
    offset: float = 0.0,
) -> Float[Array, "B"]:
    """Correctness and the Brier score of the stated confidence.

        r = w_f + w_a c + w_b (b - (q - c)^2)    with a readable confidence q
            w_b (b - 1)                          without one

    with c = `correct`, q = `confidence` and b = `offset`. The expected reward is maximal where q is the probability of
    a right answer and, since 1 - (1 - q)^2 >= -q^2 for every q, where that probability is maximal: a bounded score
    gives no incentive for confident wrong answers. The paper has r = c - (q - c)^2, which is the default; its released
    recipe has the weights 0.5 and the offset 1.

    Args:
      correct: 1 where the answer is right.
      confidence: the stated probability of a right answer; NaN, or outside [0, 1], where unreadable.
      format_weight: w_f, for a readable confidence.
      accuracy_weight: w_a.
      calibration_weight: w_b.
      offset: b; the reward of a readable confidence is never below that of an unreadable one.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for a negative weight.

    Reference: RLCR (2507.16806).
    Certainty: verified
    """
    chex.assert_rank([correct, confidence], 1)
    chex.assert_equal_shape([correct, confidence])
    right, readable = correct.astype(jnp.float32), (confidence >= 0) & (confidence <= 1)
    error = jnp.square(jnp.where(readable, confidence.astype(jnp.float32), 0.0) - right)
    reward = format_weight + accuracy_weight * right + calibration_weight * (offset - error)
    return jnp.where(readable, reward, calibration_weight * (offset - 1.0))


@ranged
def proper_score(
    correct: Float[Array, "B"], confidence: Float[Array, "B"], *, rule: ScoringRule = "brier", eps: OpenShare = 1e-4
) -> Float[Array, "B"]:
    """A strictly proper score of the stated confidence: maximal in expectation at the probability of a right answer.

        brier   -(q - c)^2
        log     c * log q + (1 - c) * log(1 - q), q within [eps, 1 - eps]

    with c = `correct` and q = `confidence`. Neither rewards right answers: add it to a reward of correctness.

    Args:
      correct: 1 where the answer is right.
      confidence: the stated probability of a right answer; NaN, or outside [0, 1], where unreadable.
      rule: 'brier' or 'log'; the latter is bounded only by eps.
      eps: for `log`; our choice.

    Returns:
      One reward per row, float32; the minimum of the rule, -1 or log eps, where the confidence is unreadable.

    Raises:
      ValueError: for an unknown rule.

    Reference: Strictly proper scoring rules, Gneiting and Raftery (2007).
    Certainty: verified
    """
    chex.assert_rank([correct, confidence], 1)
    chex.assert_equal_shape([correct, confidence])
    if rule not in get_args(ScoringRule):
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(get_args(ScoringRule))}")
    c, readable = correct.astype(jnp.float32), (confidence >= 0) & (confidence <= 1)
    q = jnp.where(readable, confidence.astype(jnp.float32), 1 - c)
    if rule == "brier":
        return -jnp.square(q - c)
    # Clip the probability of the actual outcome: 1 - (1 - eps) is not eps in float32.
    return jnp.log(jnp.clip(jnp.where(c > 0, q, 1 - q), eps, 1 - eps))


@ranged
def step_calibration(
    step_match: Float[Array, "B S"],
    stated_confidence: Float[Array, "B S"],
    internal_confidence: Float[Array, "B S"],
    *,
    knowledge_weight: NonNegative = 1.0,
    stated_weight: NonNegative = 1.0,
    internal_weight: NonNegative = 1.0,
    deviation: Deviation = "absolute",
) -> Float[Array, "B"]:
    """Correctness of steps, and agreement of the stated confidence with it and with the policy's probabilities.

        r = mean_s (w_k * k_s + w_e * (1 - |e_s - k_s|) + w_i * (1 - |e_s - i_s|))

    with k = `step_match`, e = `stated_confidence`, i = `internal_confidence`; the squared deviation is a proper score,
    the absolute one is not. The form of the three terms is our choice.

    Args:
      step_match: 1 for a step (or of the whole completion, one number per row) that matches the reference, else 0.
      stated_confidence: stated confidence of the step, in [0, 1]; levels 1 to 5 are (level - 1) / 4.
      internal_confidence: confidence from the policy's probabilities, in [0, 1].
      knowledge_weight, stated_weight, internal_weight: w_k, w_e, w_i.
      deviation: absolute or squared.

    Returns:
      One reward per row, float32. A step without a stated confidence (NaN) has the largest deviation, 1; steps with
      step_match NaN are left out; rows without steps get NaN.

    Raises:
      ValueError: for an unknown deviation.

    Reference: MMBoundary (2505.23224).
    Certainty: reconstructed
    """
    if deviation not in get_args(Deviation):
        raise ValueError(f"deviation is {deviation!r}; it must be one of {', '.join(get_args(Deviation))}")
    chex.assert_equal_shape([step_match, stated_confidence, internal_confidence])
    k, e, i = (
        jnp.asarray(x, jnp.float32).reshape(len(step_match), -1)
        for x in (step_match, stated_confidence, internal_confidence)
    )

    def agreement(one: Array, other: Array) -> Array:
        apart = jnp.abs(one - other)
        return 1 - jnp.where(jnp.isnan(apart), 1.0, apart if deviation == "absolute" else jnp.square(apart))

    there = ~jnp.isnan(k)
    each = knowledge_weight * k + stated_weight * agreement(e, k) + internal_weight * agreement(e, i)
    count = there.sum(axis=1)
    return jnp.where(count > 0, jnp.where(there, each, 0.0).sum(axis=1) / jnp.maximum(count, 1), jnp.nan)
