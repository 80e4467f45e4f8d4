"""Advantages relative to all samples drawn for a prompt, kept or not."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, ranged


@ranged
def pool_centred(
    label: Float[Array, "B"],
    pool_mean: Float[Array, "B"],
    pool_count: Float[Array, "B"],
    weight: Float[Array, "B"],
    *,
    scale: bool = False,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B"]:
    """Label minus its mean over all samples drawn for the prompt, including those that were not kept.

        A = r - mu,   or with `scale`   (r - mu) / (max(s, eps) + eps),   s^2 = mu (1 - mu) c / (c - 1)

    A pool of one sample has mu = 0 and s = 1.

    Args:
      label: 1 for a right sample, 0 for a wrong one.
      pool_mean: mu, share of right ones among all samples of the prompt.
      pool_count: c, number of all samples drawn for the prompt.
      weight: weight of each row; 0 is absent.
      scale: divide by the unbiased deviation.
      eps: see the formula.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for a negative eps.

    Reference: Reinforce-Ada (2510.04996).
    Certainty: verified
    """
    chex.assert_equal_shape([label, pool_mean, pool_count, weight])
    alone = pool_count <= 1
    mean = jnp.where(alone, 0.0, pool_mean.astype(jnp.float32))
    centred = label.astype(jnp.float32) - mean
    if scale:
        count = jnp.maximum(pool_count, 2.0)
        variance = mean * (1 - mean) * count / (count - 1)
        deviation = jnp.where(alone, 1.0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)) * (variance > 0))
        centred = centred / (jnp.maximum(deviation, eps) + eps)
    return jnp.where(weight > 0, centred, 0.0)
