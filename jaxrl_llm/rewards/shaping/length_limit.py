"""Rewards shaped by the length relative to the length limit."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Count, NonNegative, Positive, PositiveShare, ranged


@ranged
def soft_overlong(
    rewards: Float[Array, "B"],
    length: Int[Array, "B"],
    *,
    max_completion_tokens: Count,
    buffer_tokens: Count,
    factor: NonNegative = 1.0,
) -> Float[Array, "B"]:
    """Rewards with a penalty that grows over the last tokens before the length limit.

        r + min(0, -factor * (length - (L - buffer)) / buffer),   L = max_completion_tokens

    No penalty up to L - buffer, -factor at L. The paper has L = 20480 and a buffer of 4096.

    Args:
      rewards: rewards before the penalty.
      length: completion tokens.
      max_completion_tokens: the length limit L.
      buffer_tokens: number of tokens over which the penalty grows.
      factor: penalty at the limit.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: if the buffer is not within 1..max_completion_tokens, or the factor is negative.

    Reference: DAPO (2503.14476)
    Certainty: verified
    """
    chex.assert_rank([rewards, length], 1)
    chex.assert_equal_shape([rewards, length])
    if not 0 < buffer_tokens <= max_completion_tokens:
        raise ValueError(
            f"buffer_tokens is {buffer_tokens}; it must be between 1 and max_completion_tokens, which is "
            f"{max_completion_tokens}"
        )
    excess = length.astype(jnp.float32) - (max_completion_tokens - buffer_tokens)
    return rewards.astype(jnp.float32) + jnp.minimum(-factor * excess / buffer_tokens, 0.0)


def truncation_zero(rewards: Float[Array, "B"], truncated: Bool[Array, "B"]) -> Float[Array, "B"]:
    """Rewards set to 0 for completions that reached the length limit.

        r if the completion ended with end of sequence, else 0

    Args:
      rewards: rewards before.
      truncated: the completion reached its length limit before end of sequence.

    Returns:
      One reward per row, float32.

    Reference: DLER (2510.15110)
    Certainty: verified
    """
    chex.assert_rank([rewards, truncated], 1)
    chex.assert_equal_shape([rewards, truncated])
    return jnp.where(truncated.astype(bool), 0.0, rewards.astype(jnp.float32))


@ranged
def shrinking_budget_length(
    length: Int[Array, "B"],
    step: Int[Array, ""],
    *,
    total_steps: Count,
    first_tokens: Count = 800,
    least_tokens: Count = 1,
    decay: PositiveShare = 0.2,
    most: Positive = 1.0,
) -> Float[Array, "B"]:
    """A length reward with its maximum at a token budget that shrinks over the run.

        L = max(least_tokens, floor(first_tokens * decay^(step / total_steps)))
        r = most * n / L where n <= L, most * (2L - n) / L where n < 2L, else 0

    Wrong completions of L tokens get it too: keep its weight well below that of correctness.

    Args:
      length: n, completion tokens.
      step: updates made so far.
      total_steps: updates of the run.
      first_tokens: budget of the first step.
      least_tokens: the budget never falls below it.
      decay: final budget as a share of the first.
      most: the highest reward.

    Returns:
      One reward per row, float32.

    Reference: RMT (2509.24375).
    Certainty: verified
    """
    chex.assert_rank([length, step], [1, 0])
    progress = step.astype(jnp.float32) / total_steps
    # The slack keeps an exact budget from being floored to one less.
    budget = jnp.maximum(jnp.floor(first_tokens * decay**progress * (1 + 1e-6)), least_tokens)
    n = length.astype(jnp.float32)
    return most * jnp.clip(jnp.minimum(n, 2 * budget - n) / budget, 0.0, 1.0)
