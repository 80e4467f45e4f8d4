"""Weights of several objectives that follow what training does."""

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
    """Weights of rewards after a step of multiplicative updates by how much each helps all.

        s_i = sum_j <g_i, g_j>,   w <- softmax(log w + learning_rate * s / mu)

    Args:
      weights: w before, positive; they sum to 1.
      gradients: g, policy gradient of each reward alone on one batch; some layers are enough.
      learning_rate: of the policy at this step.
      mu: strength of the pull to the weights before.

    Returns:
      The new weights; a reward that is constant over the batch has no gradient and loses to the others.

    Reference: Dynamic reward weighting (2509.11452).
    Certainty: verified
    """
    chex.assert_rank([weights, gradients], [1, 2])
    influence = gradients.astype(jnp.float32) @ gradients.astype(jnp.float32).sum(0)
    return jax.nn.softmax(jnp.log(weights.astype(jnp.float32)) + learning_rate * influence / mu)
