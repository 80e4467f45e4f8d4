"""Likelihood losses on rated text: bad text gets less weight, none, or a loss that lowers its probability."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.ranges import NonNegative, Positive, Share, ranged

# The least probability of another token: that of log(1 - p) at p = 1.
_LEAST = 1e-20


def _of_tokens(rating: Array, mask: Array) -> tuple[Array, Array]:
    """(rating of each token, mask without unrated tokens)."""
    rating = rating.astype(jnp.float32)
    spread = jnp.broadcast_to(rating if rating.ndim == 2 else rating[:, None], mask.shape)
    there = (mask > 0) & ~jnp.isnan(spread)
    return jnp.where(there, spread, 0.0), jnp.where(there, mask.astype(jnp.float32), 0.0)


@ranged
def unlikelihood(
    logprobs: Float[Array, "B T"],
    rating: Float[Array, "B *T"],
    mask: Float[Array, "B T"],
    *,
    threshold: float | None = None,
    alpha: NonNegative = 1.0,
) -> Loss:
    """Raises the likelihood of good text and lowers that of each token of bad text.

        rating >= threshold     x = -log p
        else                    x = -alpha * log(1 - p)
        threshold None          x = -rating * log p - alpha * (1 - rating) * log(1 - p)

    averaged over tokens.

    Args:
      logprobs: log p of each token under the current policy.
      rating: of a row or of each token, higher is better; in [0, 1] without a threshold. NaN leaves the token out.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      threshold: about the median rating; None uses the rating as a soft label.
      alpha: strength of the push away: 1 for text, 0.01 for code.

    Returns:
      The loss as a sum and a count of tokens.

    Raises:
      ValueError: for a negative alpha.

    Reference: Pre-training with human preferences (2302.08582); unlikelihood (1908.04319).
    Certainty: verified
    """
    chex.assert_equal_shape([logprobs, mask])
    rating, mask = _of_tokens(rating, mask)
    log_p = on_mask(logprobs, mask)
    # The slope of log(1 - p) is unbounded at log p = 0: 1 - p is bounded below by _LEAST.
    others = jnp.maximum(-jnp.expm1(jnp.minimum(log_p, 0.0)), _LEAST)
    good = rating if threshold is None else (rating >= threshold).astype(jnp.float32)
    loss = -good * log_p - alpha * (1 - good) * jnp.log(others)
    return Loss((mask * jnp.where(mask > 0, loss, 0.0)).sum(), mask.sum())


@ranged
def reward_weighted_likelihood(
    logprobs: Float[Array, "B T"],
    rating: Float[Array, "B *T"],
    mask: Float[Array, "B T"],
    *,
    beta: Positive = 1.0,
    limit: Positive = 1000.0,
) -> Loss:
    """Reward-weighted regression: the likelihood of each token, weighted by its rating.

        x = -w * log p,   w = min(exp(rating / beta), limit)

    averaged over tokens.

    Args:
      logprobs: log p of each token under the current policy.
      rating: of a row or of each token, higher is better; NaN leaves out.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      beta: units of rating a factor of e.
      limit: of w.

    Returns:
      The loss as a sum and a count of tokens.

    Reference: RWR as in pre-training with human preferences (2302.08582).
    Certainty: verified
    """
    chex.assert_equal_shape([logprobs, mask])
    rating, mask = _of_tokens(rating, mask)
    factor = jnp.minimum(jnp.exp(jnp.minimum(rating / beta, 80.0)), limit)
    return Loss(-(mask * factor * on_mask(logprobs, mask)).sum(), mask.sum())


@ranged
def advantage_weighted_likelihood(
    logprobs: Float[Array, "B T"],
    values: Float[Array, "B T"],
    rating: Float[Array, "B *T"],
    mask: Float[Array, "B T"],
    *,
    share: Share = 0.5,
    beta: Positive = 1.0,
    limit: Positive = 1000.0,
) -> Loss:
    """Advantage-weighted regression: reward-weighted regression relative to a value head that is trained jointly.

        w = min(exp((rating - sg(V)) / beta), limit)
        x = share * (-w * log p) + (1 - share) * (rating - V)^2

    averaged over tokens. With share 1 and V = 0 it is `reward_weighted_likelihood`.

    Args:
      logprobs: log p of each token under the current policy.
      values: V before each token, of the head `value`.
      rating: of a row or of each token, higher is better; NaN leaves out.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      share: of the likelihood.
      beta: units of rating a factor of e.
      limit: of w.

    Returns:
      The loss as a sum and a count of tokens.

    Reference: AWR as in pre-training with human preferences (2302.08582).
    Certainty: verified
    """
    chex.assert_equal_shape([logprobs, values, mask])
    rating, mask = _of_tokens(rating, mask)
    error = jnp.where(mask > 0, rating - jnp.where(mask > 0, values.astype(jnp.float32), 0.0), 0.0)
    factor = jnp.minimum(jnp.exp(jnp.minimum(jax.lax.stop_gradient(error) / beta, 80.0)), limit)
    loss = -share * factor * on_mask(logprobs, mask) + (1 - share) * jnp.square(error)
    return Loss((mask * loss).sum(), mask.sum())
