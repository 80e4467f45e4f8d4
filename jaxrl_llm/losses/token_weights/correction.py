"""Importance correction: factors on the losses of tokens that were sampled from another distribution.

The sampler's distribution can differ from that of the policy that the update starts from: samples come from an earlier
policy, or from quantised weights. These credit functions fill `token_weight`; each multiplies the weights found so far.
Where sampler and trainer agree all weights are 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, Positive, ranged

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]


@ranged
def importance_weight(
    old_logprobs: Float[Array, "B T"],
    behaviour_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"] | None = None,
    token_weight: Float[Array, "B T"] | None = None,
    *,
    level: Level = "token",
    mode: Mode = "truncate",
    low: NonNegative | None = None,
    high: Positive | None = 2.0,
    normalize: bool = False,
    log_ratio_limit: Positive = 20.0,
) -> Float[Array, "B T"]:
    """pi_old / pi_behaviour with its tails cut: truncated (TIS) or masked (MIS) importance sampling.

        token      w = exp(d), d = log pi_old - log pi_behaviour
        sequence   w = exp(sum_t d), the same for every token of the row
        truncate   clip(w, low, high)
        mask       w where low <= w <= high, else 0

    Args:
      old_logprobs: log-probability of each token under the policy that the update starts from.
      behaviour_logprobs: under the distribution that it was sampled from; not finite means unknown, with d = 0.
      mask: non-zero on tokens that count.
      weight: weight of each row, for the mean of `normalize`; None is 1.
      token_weight: factors found so far; None is 1.
      level: a ratio for each token or one for the sequence.
      mode: what to do with ratios outside [low, high].
      low: lower bound; None is none.
      high: upper bound; None is none. Usual: 2 to truncate tokens, 3 to mask sequences.
      normalize: divide by the mean weight over the tokens of the batch.
      log_ratio_limit: bound of |log w| before exp.

    Returns:
      The new `token_weight`, without gradient; 0 outside the mask.

    Raises:
      ValueError: for an unknown level or mode, or low above high.

    Reference: truncated importance sampling: IMPALA (1802.01561); masked: IcePop (2510.18855).
    Certainty: verified
    """
    chex.assert_rank([old_logprobs, behaviour_logprobs, mask], 2)
    chex.assert_equal_shape([old_logprobs, behaviour_logprobs, mask])
    if level not in get_args(Level):
        raise ValueError(f"level is {level!r}; it must be one of {', '.join(get_args(Level))}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low is {low} and high is {high}; low must not exceed high")
    counted = mask > 0
    behaviour = behaviour_logprobs.astype(jnp.float32)
    difference = jnp.where(counted & jnp.isfinite(behaviour), old_logprobs.astype(jnp.float32) - behaviour, 0.0)
    if level == "sequence":
        difference = jnp.broadcast_to(difference.sum(-1, keepdims=True), difference.shape)
    ratio = jnp.exp(jnp.clip(difference, -log_ratio_limit, log_ratio_limit))
    if mode == "truncate":
        result = jnp.clip(ratio, low, high)
    else:
        inside = (ratio >= (0.0 if low is None else low)) & (ratio <= (jnp.inf if high is None else high))
        result = jnp.where(inside, ratio, 0.0)
    result = jnp.where(counted, result, 0.0)
    if normalize:
        share = counted.astype(jnp.float32)
        if weight is not None:
            share = share * weight.astype(jnp.float32)[:, None]
        total = (share * result).sum()
        result = jnp.where(total > 0, result * share.sum() / jnp.where(total > 0, total, 1.0), result)
    if token_weight is not None:
        result = result * jnp.where(counted, token_weight.astype(jnp.float32), 0.0)
    return jax.lax.stop_gradient(result)


@ranged
def negative_sequence_mask(
    old_logprobs: Float[Array, "B T"],
    behaviour_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    threshold: float,
) -> Float[Array, "B T"]:
    """0 on tokens with a negative advantage in sequences that have become unlikely, 1 elsewhere.

        keep = A >= 0 or mean_t(log pi_behaviour - log pi_old) <= threshold

    Bad answers that the policy rarely samples any more destabilise training; good ones are kept.
    `clipped_surrogate(off_policy_threshold=...)` applies the same rule to the current policy at every update.

    Args:
      old_logprobs: log-probability of each token under the policy that is trained.
      behaviour_logprobs: under the policy that sampled it; not finite means unknown and counts as equal.
      advantages: advantage of each token.
      mask: non-zero on tokens that count.
      token_weight: factors found so far; None is 1.
      threshold: largest mean drop of log-probability, in nats per token.

    Returns:
      The new `token_weight`; 0 outside the mask.

    Reference: DeepSeek-V3.2 (2512.02556).
    Certainty: verified
    """
    chex.assert_rank([old_logprobs, behaviour_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([old_logprobs, behaviour_logprobs, advantages, mask])
    counted = mask > 0
    behaviour = behaviour_logprobs.astype(jnp.float32)
    drop = jnp.where(counted & jnp.isfinite(behaviour), behaviour - old_logprobs.astype(jnp.float32), 0.0)
    mean_drop = drop.sum(-1, keepdims=True) / jnp.maximum(counted.sum(-1, keepdims=True), 1)
    kept = jnp.where(counted & ((advantages >= 0) | (mean_drop <= threshold)), 1.0, 0.0)
    if token_weight is not None:
        kept = kept * jnp.where(counted, token_weight.astype(jnp.float32), 0.0)
    return jax.lax.stop_gradient(kept)
