"""Entropy as an objective."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.ranges import Count, ranged


@ranged
def entropy_bonus(
    entropy: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Minus the mean entropy: minimising it with a positive coefficient keeps the policy's entropy high.

        x = -H(pi(. | state)), in nats

    Args:
      entropy: entropy of the current policy at each token, over the whole vocabulary.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      aggregation: how token entropies are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Reference: A3C (1602.01783).
    Certainty: verified
    """
    chex.assert_rank([entropy, mask], 2)
    chex.assert_equal_shape([entropy, mask])
    per_token = -entropy.astype(jnp.float32)
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
