"""Regression of a value model on returns, with bounded gradients."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged


@ranged
def huber_value(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    delta: Positive = 0.5,
    clip: NonNegative = 0.2,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Mean of two Huber errors of the value model, the second with the value clipped around the old one.

        x = 0.5 * (huber(v - R) + huber(clip(v, v_old - clip, v_old + clip) - R))
        huber(e) = e^2 / 2 where |e| <= delta, else delta * (|e| - delta / 2)

    The gradient of an error beyond `delta` is bounded by `delta`. Each of SAFE's two critics has this loss; the default
    of `clip`, not given in its source, is PPO's.

    Args:
      values: the current value model at each token.
      old_values: the value model that the update starts from.
      returns: targets R.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      delta: where the error turns from square to linear, in units of reward.
      clip: how far a value may move in the second half.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Raises:
      ValueError: for a delta that is not positive or a negative clip.

    Reference: SAFE (2602.04651).
    Certainty: verified
    """
    chex.assert_rank([values, old_values, returns, mask], 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    v = on_mask(values, mask)
    old, target = (stop_gradient(on_mask(x, mask)) for x in (old_values, returns))
    near = jnp.clip(v, old - clip, old + clip)
    per_token = 0.5 * (huber(v - target, delta) + huber(near - target, delta))
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


@ranged
def twin_huber_value(
    twin_values: Float[Array, "B 2"],
    old_twin_values: Float[Array, "B 2"],
    rewards: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    delta: Positive = 0.5,
    clip: NonNegative = 0.2,
) -> Loss:
    """`huber_value` of two critics, each fitted to the reward of whole rows: SAFE's value loss.

        mean over rows of sum_k 0.5 * (huber(v_k - r) + huber(clip(v_k, v_old_k - clip, v_old_k + clip) - r))

    Args:
      twin_values: values of each row under the current critics.
      old_twin_values: the same before the update.
      rewards: total reward of each row.
      mask: 0 on tokens that do not count, the row's weight on those that do; a row without any is absent.
      delta: where the error turns from square to linear, in units of reward.
      clip: how far a value may move in the second half.

    Returns:
      The loss as a sum and a count of rows.

    Raises:
      ValueError: for a delta that is not positive or a negative clip.

    Reference: SAFE (2602.04651).
    Certainty: verified
    """
    chex.assert_rank([twin_values, old_twin_values, rewards, mask], [2, 2, 1, 2])
    chex.assert_equal_shape([twin_values, old_twin_values])
    weight = jnp.broadcast_to(row_weight(mask.astype(jnp.float32))[:, None], twin_values.shape)
    targets = jnp.broadcast_to(rewards.astype(jnp.float32)[:, None], twin_values.shape)
    loss = huber_value(twin_values, old_twin_values, targets, weight, delta=delta, clip=clip)
    return loss._replace(denominator=weight[:, 0].sum())


def huber(error: Array, delta: float) -> Array:
    """e^2 / 2 up to delta, and linear beyond; computed from the clipped error, so that no branch is infinite."""
    inside = jnp.clip(error, -delta, delta)
    return 0.5 * jnp.square(inside) + delta * (jnp.abs(error) - jnp.abs(inside))
