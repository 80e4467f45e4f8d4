"""Losses of value heads with several outputs: quantiles or bins of the distribution of returns, or several critics."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.value.huber import huber
from jaxrl_llm.ranges import Count, NonNegative, Positive, PositiveShare, ranged

Bins = Literal["gaussian", "two_hot"]


@ranged
def quantile_value(
    values: Float[Array, "B T N"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    kappa: NonNegative = 1.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Each output of a value head learns a quantile of the returns, at the levels (i + 1/2) / N.

        x = mean_i |tau_i - 1[u_i < 0]| * huber(u_i) / kappa,   u_i = R - v_i
        huber(u) = u^2 / 2 where |u| <= kappa, else kappa * (|u| - kappa / 2)

    kappa = 0 takes |u| for huber(u) / kappa: exact quantiles, with gradients that do not vanish. `quantile_mean` turns
    the outputs into a value.

    Args:
      values: the current value model at each token, a network with `head: {outputs: N}`.
      returns: R.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      kappa: where the error changes from square to linear, in units of reward. aggregation: how token losses are
        averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Reference: distributional reinforcement learning with quantile regression (1710.10044).
    Certainty: recalled
    """
    v, target = _several(values, returns, mask)
    levels = (jnp.arange(v.shape[-1]) + 0.5) / v.shape[-1]
    u = target - v
    size = jnp.abs(u)
    if kappa:
        size = jnp.where(size <= kappa, 0.5 * jnp.square(u) / kappa, size - 0.5 * kappa)
    each = (jnp.abs(levels - (u < 0)) * size).mean(axis=-1)
    return aggregate(each, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


@ranged
def categorical_value(
    values: Float[Array, "B T N"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    low: float,
    high: float,
    form: Bins = "gaussian",
    ratio: Positive = 0.75,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Value regression as classification: cross-entropy between a distribution of the return over bins and the outputs.

        x = -sum_k p_k * log s_k,   s = softmax(v)

        gaussian   N bins of width w from low to high; p_k is the mass in bin k of a normal distribution around R, with
                   deviation ratio * w, cut off at both ends
        two_hot    N points from low to high; R is split between its two neighbours, so that its mean is R

    with R clipped to [low, high]. `bin_mean` turns the outputs into a value.

    Args:
      values: logits of the current value model at each token, a network with `head: {outputs: N}`.
      returns: R.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      low, high: range of the returns.
      form: as above.
      ratio: deviation of the gaussian in bin widths.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Raises:
      ValueError: for an unknown form, low >= high, or fewer than 2 outputs.

    Reference: HL-Gauss, Stop regressing (2403.03950).
    Certainty: recalled
    """
    v, target = _several(values, returns, mask)
    share = bin_shares(target[..., 0], count=v.shape[-1], low=low, high=high, form=form, ratio=ratio)
    each = -(share * jax.nn.log_softmax(v, axis=-1)).sum(axis=-1)
    return aggregate(each, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


def bin_shares(
    returns: Float[Array, "*B"], *, count: int, low: float, high: float, form: Bins = "gaussian", ratio: float = 0.75
) -> Float[Array, "*B N"]:
    """Target distribution of a return over `count` bins, as in `categorical_value`.

    >>> bin_shares(jnp.array([0.25]), count=3, low=0.0, high=1.0, form="two_hot").tolist()
    [[0.5, 0.5, 0.0]]
    """
    if form not in get_args(Bins):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Bins))}")
    if not low < high or count < 2:
        raise ValueError(
            f"low is {low:g}, high is {high:g} and the head has {count} outputs; take low < high and at least 2 outputs"
        )
    y = jnp.clip(returns.astype(jnp.float32), low, high)[..., None]
    if form == "two_hot":
        width = (high - low) / (count - 1)
        return jnp.maximum(1 - jnp.abs(y - jnp.linspace(low, high, count)) / width, 0.0)
    width = (high - low) / count
    mass = jnp.diff(ndtr((jnp.linspace(low, high, count + 1) - y) / (ratio * width)), axis=-1)
    return mass / mass.sum(axis=-1, keepdims=True)


@ranged
def several_values(
    values: Float[Array, "B T K"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    delta: Positive | None = None,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Squared error of several critics, averaged over critics, with separate or common returns.

        x = mean_k 0.5 * (v_k - R_k)^2,   or huber(v_k - R_k) / delta, which is |v_k - R_k| - delta / 2 beyond delta

    With `delta`, and a low quantile of the critics as the value (`critic_quantile`), the value is robust to wrong
    rewards.

    Args:
      values: the current critics at each token, a network with `head: {outputs: K}`.
      returns: R, [B, T] or one per critic, [B, T, K]: `reads: {returns: channel_returns}`.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      delta: where the error turns from square to linear, in units of reward; None is never linear.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Reference: SLIM (2402.00823), RAVL (2402.12527); with delta RIQL (2310.12955).
    Certainty: reconstructed
    """
    v, target = _several(values, returns, mask)
    error = v - target
    each = (0.5 * jnp.square(error) if delta is None else huber(error, delta) / delta).mean(axis=-1)
    return aggregate(each, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


@ranged
def expectile_value(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    expectile: PositiveShare = 0.7,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """A value between the mean and the best of the returns: returns above the value weigh more than those below.

        x = |e - 1[u < 0]| * u^2,   u = R - v

    Args:
      values: the current value model at each token.
      returns: R, such as a low quantile of several critics.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      expectile: e; 0.5 is half of the squared error, nearer to 1 is nearer to the best.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Reference: RIQL (2310.12955), implicit Q-learning (2110.06169).
    Certainty: verified
    """
    chex.assert_rank([values, returns, mask], 2)
    chex.assert_equal_shape([values, returns, mask])
    v, target = (jnp.where(mask > 0, x.astype(jnp.float32), 0.0) for x in (values, jax.lax.stop_gradient(returns)))
    u = target - v
    each = jnp.where(u < 0, 1 - expectile, expectile) * jnp.square(u)
    return aggregate(each, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


def _several(values, returns, mask):
    """Values [B, T, N] and constant returns [B, T, 1 or N] in float32, 0 outside the mask."""
    chex.assert_rank([values, returns, mask], [3, {2, 3}, 2])
    chex.assert_equal_shape_prefix([values, returns, mask], 2)
    counted = (mask > 0)[..., None]
    target = returns if returns.ndim == 3 else returns[..., None]
    if target.shape[-1] not in (1, values.shape[-1]):
        raise ValueError(f"returns of {target.shape[-1]} critics, but the head has {values.shape[-1]} outputs")
    found = (jnp.where(counted, x.astype(jnp.float32), 0.0) for x in (values, jax.lax.stop_gradient(target)))
    return tuple(found)
