"""Advantages modified by the policy's confidence."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, PositiveShare, ranged
from jaxrl_llm.statistics import group_max


@ranged
def low_probability_confidence(
    logprobs: Float[Array, "B T"], mask: Float[Array, "B T"], *, share: PositiveShare = 0.2
) -> Float[Array, "B"]:
    """Geometric mean of the probabilities of a text's least probable tokens.

        c = exp(mean of the ceil(share * n) lowest log-probabilities)

    Most tokens of a text are near certain, whatever the text; the least probable ones tell texts apart. A text without
    tokens has confidence 1.
    """
    chex.assert_rank([logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, mask])
    counted = mask > 0
    # The slack keeps an exact product such as 0.1 * 30, a little above 3 in float32, from being rounded up.
    lowest = jnp.ceil(share * counted.sum(-1).astype(jnp.float32) - 1e-4)
    ascending = jnp.sort(jnp.where(counted, logprobs.astype(jnp.float32), jnp.inf), axis=-1)
    chosen = jnp.arange(logprobs.shape[-1]) < jnp.where(counted.any(-1), jnp.maximum(lowest, 1), 0)[:, None]
    mean = jnp.where(chosen, ascending, 0.0).sum(-1) / jnp.maximum(chosen.sum(-1), 1)
    return jnp.exp(mean)


@ranged
def confidence_shaped(
    advantages: Float[Array, "B T"],
    rewards: Float[Array, "B"],
    old_logprobs: Float[Array, "B T"],
    prompt_logprobs: Float[Array, "B P"],
    prompt_mask: Float[Array, "B P"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    alpha: NonNegative = 0.3,
    share: PositiveShare = 0.2,
) -> Float[Array, "B T"]:
    """Advantages, higher for answers that the policy was less confident of than of the prompt.

        A + alpha * (c(prompt) - c(answer)), unchanged in groups whose rewards are all 0

    with c(text) = exp(mean of the `share` lowest token log-probabilities). Of two correct answers the less confident
    gets the larger advantage, which preserves diversity.

    The paper's text was not at hand: the formula of c, alpha and the share are our reading of its abstract and of
    reviews.

    Args:
      advantages: advantage of each token, usually GRPO's.
      rewards: total reward of each row.
      old_logprobs: log-probability of each token under the policy that the update starts from.
      prompt_logprobs: the same for the tokens of the prompt.
      prompt_mask: non-zero on prompt tokens that have a log-probability.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      alpha: units of advantage for the step from probability 0 to 1.
      share: share of a text's tokens that its confidence is read from.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for a negative alpha, or a share outside (0, 1].

    Reference: ProGRPO (2602.05281).
    Certainty: reconstructed
    """
    chex.assert_rank([advantages, old_logprobs, mask, rewards], [2, 2, 2, 1])
    chex.assert_equal_shape([advantages, old_logprobs, mask])
    prompt = low_probability_confidence(prompt_logprobs, prompt_mask, share=share)
    answer = low_probability_confidence(old_logprobs, mask, share=share)
    rewarded = group_max(jnp.abs(rewards.astype(jnp.float32)), group, weight) > 0
    bonus = jnp.where(rewarded, alpha * (prompt - answer), 0.0)
    counted = (mask > 0) & (weight > 0)[:, None]
    return jnp.where(counted, advantages.astype(jnp.float32) + bonus[:, None], 0.0)
