"""A policy loss on samples of several past policies."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.ratio import constant_factor, log_ratio, token_share
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged


@ranged
def mixed_policy_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    behaviour_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """The clipped surrogate of ReMix, for a batch of fresh and replayed samples.

    With r = pi / pi_behaviour of a token and c = pi_old / pi_behaviour, the ratio that the update starts from:

        x = max(-A * r, -A * clip(r, c - clip_low, c + clip_high))

    Fresh samples have c = 1, where it is PPO's surrogate. ReMix takes 40% of a batch from the last two policies and two
    updates per batch, and stops replay at a switch step. Reading clip_low and clip_high as distances from c, not shares
    of it, rests on a second-hand source.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      behaviour_logprobs: under the policy that sampled it.
      advantages: advantage of each token.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a constant factor on each token's loss; None is 1.
      clip_low: how far the ratio may fall below c.
      clip_high: how far it may rise above c.
      log_ratio_limit: bound of |log r| and |log c| before exp.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `clip_share` (tokens whose gradient the clip dropped).

    Raises:
      ValueError: for a negative clip range.

    Reference: ReMix (2507.06892).
    Certainty: recalled
    """
    chex.assert_rank([logprobs, old_logprobs, behaviour_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, behaviour_logprobs, advantages, mask])
    ratio = jnp.exp(log_ratio(logprobs, behaviour_logprobs, mask, log_ratio_limit=log_ratio_limit))
    start = log_ratio(old_logprobs, behaviour_logprobs, mask, log_ratio_limit=log_ratio_limit)
    centre = jnp.exp(jax.lax.stop_gradient(start))
    signal = constant_factor(advantages, mask)
    low, high = centre - clip_low, centre + clip_high
    per_token = jnp.maximum(-signal * ratio, -signal * jnp.clip(ratio, low, high))
    if token_weight is not None:
        per_token = per_token * constant_factor(token_weight, mask)
    clipped = ((signal > 0) & (ratio > high)) | ((signal < 0) & (ratio < low))
    loss = aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics={"clip_share": token_share(clipped, mask)})
