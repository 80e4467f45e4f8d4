"""Policy losses on the token ratio.

All are sums over tokens of -advantage * g(ratio), with ratio = pi / pi_old. They differ in g far from 1: the ratio is
ignored (`policy_gradient`), clipped (`clipped_surrogate`), clipped once for the whole sequence
(`sequence_clipped_surrogate`), clipped as a weight without dropping gradients (`cispo`), or squashed (`sapo`).
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.ratio import constant_factor, log_ratio, on_mask, pessimistic_surrogate, token_share
from jaxrl_llm.losses.token_weights.correction import negative_sequence_mask
from jaxrl_llm.ranges import AboveOne, Count, NonNegative, Positive, ranged

WeightLevel = Literal["token", "sequence"]


@ranged
def policy_gradient(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """REINFORCE: raise the log-probability of tokens in proportion to their advantage.

        x = -sg(w) * sg(A) * log pi

    Without a weight it is valid on fresh samples only. Every method that reweights or drops tokens without
    differentiating the weight is this function with its own `token_weight` (a dropped token has weight 0 and still
    counts in the denominator).

    Args:
      logprobs: log-probability of each token under the current policy.
      advantages: advantage of each token.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: w, a constant factor on each token; None is 1.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Reference: Williams, REINFORCE (1992).
    Certainty: verified
    """
    chex.assert_rank([logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, advantages, mask])
    per_token = -constant_factor(advantages, mask, token_weight) * on_mask(logprobs, mask)
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


@ranged
def clipped_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
    dual_clip: AboveOne | None = None,
    ratio_cap: Positive | None = None,
    off_policy_threshold: float | None = None,
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """PPO's clipped surrogate: no gradient from tokens whose ratio passed the clip bound in the advantage's direction.

    With r = pi / pi_old of a token:

        x = max(-A * min(r, ratio_cap), -A * clip(r, 1 - clip_low, 1 + clip_high))
        where A < 0: x = min(x, -A * dual_clip)

    clip_high > clip_low is DAPO's clip-higher. `dual_clip` and `ratio_cap` both bound the loss of a token with A < 0
    and a large ratio.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      advantages: advantage of each token.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a constant factor on each token's loss, such as an importance correction; None is 1.
      clip_low: how far the ratio may fall below 1.
      clip_high: how far it may rise above 1.
      dual_clip: largest ratio that multiplies a negative advantage, above 1; None is no limit.
      ratio_cap: largest ratio of the unclipped branch (two-sided clipping), at least 1 + clip_high; None is none.
      off_policy_threshold: drop sequences with a negative advantage whose mean(log pi_old - log pi) exceeds this many
        nats per token; None drops none (see `negative_sequence_mask`).
      log_ratio_limit: bound of |log r| before exp.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metrics `clip_share` (tokens whose gradient the clip dropped) and, with `dual_clip`,
      `dual_clip_share`.

    Raises:
      ValueError: for a negative clip range, or a ratio_cap below 1 + clip_high.

    Reference: PPO (1707.06347); dual clip (1912.09729); DAPO (2503.14476); two-sided clip: INTELLECT-2 (2505.07291);
      sequence mask: DeepSeek-V3.2 (2512.02556).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    if ratio_cap is not None and ratio_cap < 1 + clip_high:
        raise ValueError(f"ratio_cap is {ratio_cap}; it must be at least 1 + clip_high = {1 + clip_high}")
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=log_ratio_limit))
    signal = constant_factor(advantages, mask)
    per_token, clipped = pessimistic_surrogate(
        ratio, signal, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap
    )
    metrics = {"clip_share": token_share(clipped, mask)}
    if dual_clip is not None:
        capped = (signal < 0) & (per_token > -signal * dual_clip)
        per_token = jnp.where(signal < 0, jnp.minimum(per_token, -signal * dual_clip), per_token)
        metrics["dual_clip_share"] = token_share(capped, mask)
    if off_policy_threshold is not None:
        current = jax.lax.stop_gradient(logprobs)
        kept = negative_sequence_mask(current, old_logprobs, signal, mask, threshold=off_policy_threshold)
        per_token = per_token * kept
    if token_weight is not None:
        per_token = per_token * constant_factor(token_weight, mask)
    loss = aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics=metrics)


@ranged
def cispo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    clip_low: NonNegative = 1.0,
    clip_high: NonNegative = 4.0,
    negative_clip_low: NonNegative | None = None,
    negative_clip_high: NonNegative | None = None,
    level: WeightLevel = "token",
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """CISPO: the importance weight is clipped, the gradient of no token is dropped.

        x = -sg(clip(r, 1 - clip_low, 1 + clip_high)) * A * log pi

    With its own range where A < 0 it is DISPO. With weight 1 where A >= 0 (clip_low = clip_high = 0) and a weight in
    [0, 1] where A < 0 (negative_clip_low 1, negative_clip_high 0) it is TOPR, which stays stable over many updates on
    one batch: the gradient of a bad sample vanishes with its probability. TOPR has level 'sequence'.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      advantages: advantage of each token.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a further constant factor on each token; None is 1.
      clip_low: how far the weight may fall below 1; 1 or more is no lower bound.
      clip_high: how far it may rise above 1; TRL's ceiling is 1 + clip_high.
      negative_clip_low: `clip_low` where A < 0; None is the same.
      negative_clip_high: `clip_high` where A < 0; None is the same.
      level: 'token' has r = pi / pi_old of the token, 'sequence' that of the whole sequence on each of its tokens.
      log_ratio_limit: bound of |log r| before exp.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `clip_share` (tokens whose weight was clipped; ranges of width 0 are not counted).

    Raises:
      ValueError: for a negative clip range or an unknown level.

    Reference: MiniMax-M1 (2506.13585); four bounds: DISPO (2602.00983), TOPR (2503.14286).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    negative_low = clip_low if negative_clip_low is None else negative_clip_low
    negative_high = clip_high if negative_clip_high is None else negative_clip_high
    if level not in get_args(WeightLevel):
        raise ValueError(f"level is {level!r}; it must be one of {', '.join(get_args(WeightLevel))}")
    difference = log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=log_ratio_limit if level == "token" else 1e4)
    if level == "sequence":
        total = jnp.clip(difference.sum(-1, keepdims=True), -log_ratio_limit, log_ratio_limit)
        difference = jnp.broadcast_to(total, difference.shape)
    ratio = jax.lax.stop_gradient(jnp.exp(difference))
    negative = advantages < 0
    low = jnp.where(negative, 1 - negative_low, 1 - clip_low)
    high = jnp.where(negative, 1 + negative_high, 1 + clip_high)
    weight = jnp.clip(ratio, low, high)
    # A range of width 0 sets the weight to 1 by design, which is not clipping.
    metrics = {"clip_share": token_share((weight != ratio) & (low != high), mask)}
    if token_weight is not None:
        weight = weight * on_mask(token_weight, mask)
    loss = policy_gradient(
        logprobs, advantages, mask, weight, aggregation=aggregation, max_completion_tokens=max_completion_tokens
    )
    return loss._replace(metrics=metrics)


@ranged
def sapo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    positive_temperature: Positive = 1.0,
    negative_temperature: Positive = 1.05,
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "seq_mean_token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """SAPO: a sigmoid gate on the ratio in place of the hard clip.

        x = -A * sigmoid(tau * (r - 1)) * 4 / tau

    The gradient at r = 1 is that of REINFORCE and fades on both sides, faster for a larger tau.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      advantages: advantage of each token.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a constant factor on each token's loss; None is 1.
      positive_temperature: tau where A > 0.
      negative_temperature: tau elsewhere.
      log_ratio_limit: bound of |log r| before exp.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Raises:
      ValueError: for a temperature that is not positive.

    Reference: SAPO (2511.20347).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=log_ratio_limit))
    tau = jnp.where(advantages > 0, positive_temperature, negative_temperature)
    gate = jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau
    per_token = -constant_factor(advantages, mask, token_weight) * gate
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
