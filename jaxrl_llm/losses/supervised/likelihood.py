"""Supervised learning on given tokens."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.ranges import Count, ranged


@ranged
def negative_log_likelihood(
    logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Cross-entropy of the given tokens, as in supervised fine-tuning.

        x = -log pi

    Args:
      logprobs: log-probability of each token under the current policy.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      aggregation: how token losses are averaged; `token_mean` is the usual cross-entropy.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Certainty: verified
    """
    chex.assert_rank([logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, mask])
    per_token = -logprobs.astype(jnp.float32)
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
