"""Advantages with the extreme ones taken out."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import Positive, ranged
from jaxrl_llm.statistics import moments, token_weights

FilterRule = Literal["deviations", "released"]


@ranged
def sigma_filtered(
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    rule: FilterRule = "deviations",
    limit: Positive = 3.0,
) -> Float[Array, "B T"]:
    """Advantages in units of their deviation over the tokens of the batch, 0 where they are extreme.

        z = (A - mean) / sqrt(max(variance, 1e-8))

        deviations   A = z where |z| <= limit, else 0
        released     A = z where mean - limit <= z <= mean + limit and |z| <= 10, else 0: the authors' code, which adds
                     the mean of the raw advantages to a bound of whitened ones

    Mean and population variance count every token once, so long completions dominate them.

    Args:
      advantages: advantage of each token.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      rule: which bounds.
      limit: largest distance from the mean, in standard deviations.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for an unknown rule or a limit that is not positive.

    Reference: StableReinforce, R1-Reward (2505.02835).
    Certainty: verified
    """
    chex.assert_rank([advantages, mask], 2)
    chex.assert_equal_shape([advantages, mask])
    if rule not in get_args(FilterRule):
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(get_args(FilterRule))}")
    counts = token_weights(mask, weight)
    mean, variance = moments(advantages, counts, ddof=0)
    z = jnp.where(counts > 0, advantages.astype(jnp.float32) - mean, 0.0) / jnp.sqrt(jnp.maximum(variance, 1e-8))
    kept = jnp.abs(z) <= limit
    if rule == "released":
        kept = (jnp.abs(z - mean) <= limit) & (jnp.abs(z) <= 10.0)
    return jnp.where(kept & (counts > 0), z, 0.0)
