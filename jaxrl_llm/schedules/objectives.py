"""Adaptive weights of several objectives."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, Positive, ranged


@ranged
def influence_weights(
    weights: Float[Array, "K"],
    gradients: Float[Array, "K D"],
    *,
    learning_rate: NonNegative = 1e-6,
    mu: Positive = 1e-5,
) -> Float[Array, "K"]:
    """Weights of rewards after one multiplicative update by the influence of each reward on all of them.

        s_i = sum_j <g_i, g_j>,   w <- softmax(log w + learning_rate * s / mu)

    Args:
      weights: w before the update, positive, with sum 1.
      gradients: g, policy gradient of each single reward on one batch; the gradient of a subset of layers suffices.
      learning_rate: of the policy at this step.
      mu: strength of the regularisation towards the old weights.

    Returns:
      The new weights [K]; a reward that is constant over the batch has gradient 0 and influence 0.

    Reference: Dynamic reward weighting (2509.11452).
    Certainty: verified
    """
    chex.assert_rank([weights, gradients], [1, 2])
    influence = gradients.astype(jnp.float32) @ gradients.astype(jnp.float32).sum(0)
    return jax.nn.softmax(jnp.log(weights.astype(jnp.float32)) + learning_rate * influence / mu)
