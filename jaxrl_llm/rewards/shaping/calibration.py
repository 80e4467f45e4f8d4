"""Rewards for answers that know how likely they are to be right."""

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

        r = w_f + w_a c + w_b (b - (q - c)^2)    where a confidence q can be read
            w_b (b - 1)                          elsewhere

    with c = `correct`, q = `confidence` and b = `offset`. The expected reward is largest where q is the probability of
    being right and, since 1 - (1 - q)^2 is at least -q^2 for every q, where the answer is as likely right as can be:
    a bounded score does not pay for wrong answers that are sure of it. The paper has r = c - (q - c)^2, which is the
    default; its released recipe has the weights 0.5 and the offset 1.

    Args:
      correct: 1 where the answer is right.
      confidence: the stated probability of that; NaN, or a number outside of [0, 1], where none can be read.
      format_weight: w_f, for a confidence that can be read.
      accuracy_weight: w_a.
      calibration_weight: w_b.
      offset: b; the least reward of a readable confidence is never below that of one that cannot be read.

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
    """A strictly proper score of the stated confidence: largest on average where it is the probability of being right.

        brier   -(q - c)^2
        log     c * log q + (1 - c) * log(1 - q), q within [eps, 1 - eps]

    with c = `correct` and q = `confidence`. Neither pays for right answers: add it to a reward that does.

    Args:
      correct: 1 where the answer is right.
      confidence: the stated probability of that; NaN, or a number outside of [0, 1], where none can be read.
      rule: which of the two; the second is unbounded but for eps.
      eps: for `log`; ours.

    Returns:
      One reward per row, float32; the least that the rule can give, -1 or log eps, where no confidence can be read.

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
    # Of the probability that was given to what happened: 1 - (1 - eps) is not eps in 32 bits.
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
    """Steps that are right, with a stated confidence that agrees with that and with the policy's own probabilities.

        r = mean_s (w_k * k_s + w_e * (1 - |e_s - k_s|) + w_i * (1 - |e_s - i_s|))

    with k = `step_match`, e = `stated_confidence`, i = `internal_confidence`; squares in the place of absolute
    values are proper, which absolute values are not. The form of the three terms is our choice.

    Args:
      step_match: 1 for a step (or the whole completion, one number per row) that matches the reference, else 0.
      stated_confidence: what the step says of itself, in [0, 1]; levels 1 to 5 are (level - 1) / 4.
      internal_confidence: of the policy's probabilities, in [0, 1].
      knowledge_weight, stated_weight, internal_weight: w_k, w_e, w_i.
      deviation: absolute or squared.

    Returns:
      One reward per row, float32. A step that states nothing (NaN) has the worst deviation, 1; one whose match is NaN
      is none; a row without steps gets NaN.

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
