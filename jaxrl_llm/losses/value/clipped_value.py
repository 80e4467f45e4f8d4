"""Regression of a value model on returns."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.ranges import Count, NonNegative, ranged


@ranged
def clipped_value(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    clip: NonNegative | None = 0.2,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Squared error of the value model, without gradient from moving further than `clip` in one batch.

        x = 0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)

    Args:
      values: the current value model at each token.
      old_values: the value model that the update starts from.
      returns: targets R.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      clip: how far a value may move, in units of reward; None is plain squared error.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `clip_share` (tokens where the clipped error is the larger one).

    Raises:
      ValueError: for a negative clip.

    Reference: PPO (1707.06347).
    Certainty: verified
    """
    chex.assert_rank([values, old_values, returns, mask], 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    constants = jax.lax.stop_gradient((old_values, returns))
    values, old_values, returns = (jnp.where(mask > 0, x.astype(jnp.float32), 0.0) for x in (values, *constants))
    error = jnp.square(values - returns)
    metrics = {}
    if clip is not None:
        clipped_error = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
        share = jnp.where(clipped_error > error, mask.astype(jnp.float32), 0.0)
        metrics["clip_share"] = (share.sum(), mask.astype(jnp.float32).sum())
        error = jnp.maximum(error, clipped_error)
    loss = aggregate(0.5 * error, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics=metrics)
