"""REINFORCE on samples of an older policy, with a mask and a weight for each token's gradient."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.policy.surrogates import policy_gradient
from jaxrl_llm.losses.ratio import constant_factor, log_ratio, on_mask, token_share
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged

Keep = Literal["all", "two_side", "one_side", "ring"]
Importance = Literal["none", "ratio", "advantage"]


@ranged
def masked_policy_gradient(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    keep: Keep = "one_side",
    importance: Importance = "ratio",
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
    ring_low: NonNegative = 0.6,
    ring_high: NonNegative = 2.0,
    advantage_temperature: Positive = 1.0,
    drift_penalty: NonNegative = 0.0,
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """REC: group-relative REINFORCE whose weight and mask are both constants of the current policy.

        x = -sg(w * keep) * A * log pi + drift_penalty * (log pi - log pi_old)^2

    with r = pi / pi_old of a token and

        keep  all        every token
              two_side   1 - clip_low <= r <= 1 + clip_high
              one_side   r <= 1 + clip_high where A >= 0, r >= 1 - clip_low where A <= 0
              ring       two_side, or r <= 1 - ring_low where A >= 0, or r >= 1 + ring_high where A <= 0
        w     none       1
              ratio      r
              advantage  exp(A / advantage_temperature)

    one_side with the ratio has the gradient of PPO's clipped surrogate; all with neither is plain REINFORCE. The drift
    penalty is not masked: it also acts on tokens without a policy gradient.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      advantages: advantage of each token.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a further constant factor on each token's policy gradient; None is 1.
      keep: which tokens keep their gradient; the others still count in the denominator.
      importance: the weight w.
      clip_low: how far the ratio may fall below 1.
      clip_high: how far it may rise above 1.
      ring_low: ring keeps tokens of A >= 0 that fell at least this far below 1.
      ring_high: ring keeps tokens of A <= 0 that rose at least this far above 1.
      advantage_temperature: in units of advantage.
      drift_penalty: coefficient of the squared log-ratio, without the factor 1/2; 0.1 where it is used.
      log_ratio_limit: bound of |log r| and of |A| / advantage_temperature before exp.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `clip_share` (tokens that lost their gradient).

    Raises:
      ValueError: for an unknown choice, a negative range, a ring inside the range, or a temperature not above 0.

    Reference: Group-relative REINFORCE off-policy (2509.24203).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    _check(keep, importance, clip_low, clip_high, ring_low, ring_high)
    difference = log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=log_ratio_limit)
    ratio = jnp.exp(jax.lax.stop_gradient(difference))
    signal = constant_factor(advantages, mask)
    kept = _kept(keep, ratio, signal, clip_low, clip_high, ring_low, ring_high)
    factor = kept.astype(jnp.float32)
    if importance == "ratio":
        factor = factor * ratio
    elif importance == "advantage":
        factor = factor * jnp.exp(jnp.clip(signal / advantage_temperature, -log_ratio_limit, log_ratio_limit))
    if token_weight is not None:
        factor = factor * on_mask(token_weight, mask)
    averaged = {"aggregation": aggregation, "max_completion_tokens": max_completion_tokens}
    loss = policy_gradient(logprobs, advantages, mask, factor, **averaged)
    if drift_penalty:
        penalty = aggregate(drift_penalty * jnp.square(difference), mask, **averaged)
        loss = loss._replace(numerator=loss.numerator + penalty.numerator)
    return loss._replace(metrics={"clip_share": token_share(~kept, mask)})


def _kept(
    keep: Keep, ratio: Array, signal: Array, clip_low: float, clip_high: float, ring_low: float, ring_high: float
) -> Bool[Array, "B T"]:
    good, bad = signal >= 0, signal <= 0
    not_low, not_high = ratio >= 1 - clip_low, ratio <= 1 + clip_high
    match keep:
        case "all":
            return jnp.ones(ratio.shape, bool)
        case "two_side":
            return not_low & not_high
        case "one_side":
            return (good & not_high) | (bad & not_low)
        case "ring":
            return (not_low & not_high) | (good & (ratio <= 1 - ring_low)) | (bad & (ratio >= 1 + ring_high))


def _check(keep, importance, clip_low, clip_high, ring_low, ring_high):
    if keep not in get_args(Keep):
        raise ValueError(f"keep is {keep!r}; it must be one of {', '.join(get_args(Keep))}")
    if importance not in get_args(Importance):
        raise ValueError(f"importance is {importance!r}; it must be one of {', '.join(get_args(Importance))}")
    if keep == "ring" and (ring_low < clip_low or ring_high < clip_high):
        raise ValueError(
            f"ring_low is {ring_low} and ring_high is {ring_high}; the ring lies outside the clip range, so they must "
            f"be at least clip_low {clip_low} and clip_high {clip_high}"
        )
