"""Rewards for answers that know how likely they are to be right."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, ranged


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
      One reward a row, float32.

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
