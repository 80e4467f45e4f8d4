"""Policy losses with one importance ratio for a whole sequence."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.ratio import constant_factor, log_ratio, pessimistic_surrogate
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged

SequenceRatio = Literal["geometric_mean", "token", "product"]


@ranged
def sequence_clipped_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    ratio: SequenceRatio = "geometric_mean",
    clip_low: NonNegative = 3e-4,
    clip_high: NonNegative = 4e-4,
    log_ratio_limit: Positive = 10.0,
    aggregation: Aggregation = "seq_mean_token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """GSPO: one ratio and one clip decision for a whole sequence.

    With d the log-ratio of a token and n the tokens of the row, the ratio s is

        geometric_mean   exp(sum_t d / n)
        token            exp(lp - sg(lp) + sg(sum_t d / n)): the same value, but the gradient of a token has only
                         its own advantage (GSPO-token)
        product          exp(sum_t d): the exact sequence ratio, as in the RLOO of TRL

    and x = max(-A * s, -A * clip(s, 1 - clip_low, 1 + clip_high)) on every token of the row.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      advantages: advantage of each token, usually constant along a row.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a constant factor on each token's loss; None is 1.
      ratio: which ratio; the first two have equal gradients where the advantage is constant along the row.
      clip_low: how far the ratio may fall below 1; two orders below PPO's for a geometric mean.
      clip_high: how far it may rise above 1.
      log_ratio_limit: bound of |log s| before exp.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `clip_share` (sequences whose gradient the clip dropped).

    Raises:
      ValueError: for an unknown ratio or a negative clip range.

    Reference: GSPO (2507.18071).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    # Also bounded per token, so that one token of probability 0 does not make the sum infinite.
    token_log_ratio = log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=1e4)
    total = token_log_ratio.sum(-1, keepdims=True)
    mean = total / jnp.maximum((mask > 0).sum(-1, keepdims=True), 1)
    match ratio:
        case "geometric_mean":
            log_s = jnp.broadcast_to(mean, mask.shape)
        case "token":
            log_s = token_log_ratio - jax.lax.stop_gradient(token_log_ratio) + jax.lax.stop_gradient(mean)
        case "product":
            log_s = jnp.broadcast_to(total, mask.shape)
        case _:
            raise ValueError(f"ratio is {ratio!r}; it must be one of {', '.join(get_args(SequenceRatio))}")
    sequence_ratio = jnp.exp(jnp.clip(log_s, -log_ratio_limit, log_ratio_limit))
    per_token, clipped = pessimistic_surrogate(
        sequence_ratio, constant_factor(advantages, mask), clip_low=clip_low, clip_high=clip_high
    )
    if token_weight is not None:
        per_token = per_token * constant_factor(token_weight, mask)
    loss = aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    share = aggregate(clipped.astype(jnp.float32), mask, aggregation="seq_mean_token_mean")
    return loss._replace(metrics={"clip_share": (share.numerator, row_weight(mask).sum())})
