"""Training only on the tokens of high entropy of each response, the forking tokens.

All statistics are of one response and of the policy that the update starts from, so they are the same however a batch
is split, and a response trains on the same tokens at every update of a batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.divergences.estimates import Estimator, kl_estimate
from jaxrl_llm.ranges import Count, PositiveShare, Share, ranged

Selection = Literal["top_share", "otsu"]
Band = Literal["quantile", "deviation"]
OTSU_BINS = 100
NORMAL_DEVIATION = 1.4826  # the standard deviation of a normal distribution in units of its median absolute deviation


@ranged
def forking_mask(
    entropy: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    selection: Selection = "top_share",
    share: PositiveShare = 0.2,
) -> Bool[Array, "B T"]:
    """True on the tokens of high entropy of each response; see `forking_tokens`."""
    chex.assert_rank([entropy, mask], 2)
    chex.assert_equal_shape([entropy, mask])
    if selection not in get_args(Selection):
        raise ValueError(f"selection is {selection!r}; it must be one of {', '.join(get_args(Selection))}")
    counted = mask > 0
    entropy = stop_gradient(jnp.where(counted, entropy.astype(jnp.float32), 0.0))
    if selection == "otsu":
        return counted & jax.vmap(_above_otsu)(entropy, counted)
    # The slack keeps an exact product such as 0.1 * 30, a little above 3 in float32, from being rounded up.
    k = jnp.ceil(share * counted.sum(-1).astype(jnp.float32) - 1e-4).astype(jnp.int32)
    descending = -jnp.sort(jnp.where(counted, -entropy, jnp.inf), axis=-1)
    threshold = jnp.take_along_axis(descending, jnp.maximum(k - 1, 0)[:, None], axis=-1)
    return counted & (entropy >= threshold)


def _above_otsu(entropy: Float[Array, "T"], counted: Bool[Array, "T"]) -> Bool[Array, "T"]:
    """Tokens above Otsu's split of the histogram of entropies; all tokens where the entropies are equal."""
    low = jnp.min(jnp.where(counted, entropy, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(counted, entropy, -jnp.inf), initial=-jnp.inf)
    varies = high > low
    width = jnp.where(varies, (high - low) / OTSU_BINS, 1.0)
    position = jnp.where(counted & varies, (entropy - low) / width, 0.0)
    bins = jnp.clip(jnp.floor(position), 0, OTSU_BINS - 1).astype(jnp.int32)
    counts = jax.ops.segment_sum(counted.astype(jnp.float32), bins, num_segments=OTSU_BINS)
    sums = jnp.cumsum(counts * jnp.arange(OTSU_BINS))
    below, total = jnp.cumsum(counts), counts.sum()
    above = total - below
    distance = sums / jnp.maximum(below, 1.0) - (sums[-1] - sums) / jnp.maximum(above, 1.0)
    split = jnp.argmax(below * above * jnp.square(distance))
    return (bins > split) | ~varies


def row_quantile(values: Float[Array, "B T"], chosen: Bool[Array, "B T"], level: float) -> Float[Array, "B 1"]:
    """Quantile of each row's chosen entries, linear between neighbours; 0 in a row without any."""
    last = jnp.maximum(chosen.sum(-1, keepdims=True) - 1, 0)
    ascending = jnp.sort(jnp.where(chosen, values, jnp.inf), axis=-1)
    ascending = jnp.where(jnp.isfinite(ascending), ascending, 0.0)
    position = level * last.astype(jnp.float32)
    below = jnp.floor(position).astype(jnp.int32)
    low = jnp.take_along_axis(ascending, below, axis=-1)
    high = jnp.take_along_axis(ascending, jnp.minimum(below + 1, last), axis=-1)
    return low + (position - below) * (high - low)


@ranged
def forking_tokens(
    old_entropy: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    selection: Selection = "top_share",
    share: PositiveShare = 0.2,
) -> Float[Array, "B T"]:
    """1 on the high-entropy tokens of each response, 0 on the others.

        top_share   the ceil(share * n) tokens of highest entropy, ties of the last one included
        otsu        tokens above Otsu's split of a histogram of 100 equal bins from the lowest to the highest entropy

    A policy loss with these weights trains on forking tokens only and still divides by all tokens. The paper's text was
    not at hand: the rounding, the histogram's edges and ties are our choices.

    Args:
      old_entropy: entropy of the policy that the update starts from, over the vocabulary, in nats.
      mask: non-zero on tokens that count.
      token_weight: factors found so far; None is 1.
      selection: which tokens are chosen; "top_share" in the paper's first version, "otsu" in its second.
      share: share of a response's tokens for "top_share".

    Returns:
      The new `token_weight`; 0 outside the mask.

    Raises:
      ValueError: for an unknown selection or a share outside (0, 1].

    Reference: SPINE (2511.17938).
    Certainty: reconstructed
    """
    chosen = forking_mask(old_entropy, mask, selection=selection, share=share)
    factor = 1.0 if token_weight is None else token_weight.astype(jnp.float32)
    return stop_gradient(jnp.where(chosen, factor, 0.0))


@ranged
def entropy_band(
    entropy: Float[Array, "B T"],
    old_entropy: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    selection: Selection = "top_share",
    share: PositiveShare = 0.2,
    band: Band = "quantile",
    low: Share = 0.1,
    high: Share = 0.5,
    aggregation: Aggregation = "seq_mean_token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Distance of the entropy of forking tokens from a band of entropies that they had before the update.

        x = max(H - upper, 0) + max(lower - H, 0) where the token is a forking one, else 0

        quantile    lower and upper are the quantiles `low` and `high` of the old entropy on the response's forking
                    tokens
        deviation   upper is their median, lower is max(0, median - 1.4826 * mad) with mad their median absolute
                    deviation

    Divided by all tokens of the response. The band lowers the highest entropies and raises the lowest. The paper's text
    was not at hand: the quantiles' interpolation and the usual coefficient, about 0.01, are our reading.

    Args:
      entropy: entropy of the current policy at each token, in nats.
      old_entropy: that of the policy that the update starts from; gives forking tokens and band, without gradient.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      selection, share: which tokens are forking, as for `forking_tokens`.
      band: which band; "quantile" in the paper's first version, "deviation" in its second.
      low: level of the lower end of "quantile".
      high: level of its upper end.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `outside_band_share` (tokens with a penalty).

    Raises:
      ValueError: for an unknown selection or band, a share outside (0, 1], or levels not 0 <= low <= high <= 1.

    Reference: SPINE (2511.17938).
    Certainty: reconstructed
    """
    chex.assert_rank([entropy, old_entropy, mask], 2)
    chex.assert_equal_shape([entropy, old_entropy, mask])
    if band not in get_args(Band):
        raise ValueError(f"band is {band!r}; it must be one of {', '.join(get_args(Band))}")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low is {low} and high is {high}; they are levels with 0 <= low <= high <= 1")
    chosen = forking_mask(old_entropy, mask, selection=selection, share=share)
    old = stop_gradient(jnp.where(chosen, old_entropy.astype(jnp.float32), 0.0))
    if band == "quantile":
        lower, upper = row_quantile(old, chosen, low), row_quantile(old, chosen, high)
    else:
        upper = row_quantile(old, chosen, 0.5)
        lower = jnp.maximum(upper - NORMAL_DEVIATION * row_quantile(jnp.abs(old - upper), chosen, 0.5), 0.0)
    current = jnp.where(chosen, entropy.astype(jnp.float32), 0.0)
    distance = jnp.where(chosen, jnp.maximum(current - upper, 0.0) + jnp.maximum(lower - current, 0.0), 0.0)
    outside = jnp.where(distance > 0, mask.astype(jnp.float32), 0.0).sum()
    loss = aggregate(distance, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics={"outside_band_share": (outside, mask.astype(jnp.float32).sum())})


@ranged
def forking_kl(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    old_entropy: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    selection: Selection = "top_share",
    share: PositiveShare = 0.2,
    estimator: Estimator = "k3",
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """An estimate of KL(policy || reference) on forking tokens, divided by their number.

    Other tokens are not constrained. The paper's estimator is not known; differentiating k3 is common practice
    (`kl_estimate` states its gradient).

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      old_entropy: entropy of the policy that the update starts from; selects the forking tokens.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      selection, share: which tokens are forking, as for `forking_tokens`.
      estimator: 'k1', 'k2' or 'k3'.
      aggregation: how token values are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The estimate in nats a forking token.

    Raises:
      ValueError: for an unknown selection or estimator, or a share outside (0, 1].

    Reference: SPINE (2511.17938).
    Certainty: reconstructed
    """
    chosen = forking_mask(old_entropy, mask, selection=selection, share=share)
    return kl_estimate(
        logprobs,
        reference_logprobs,
        jnp.where(chosen, mask, 0),
        estimator=estimator,
        aggregation=aggregation,
        max_completion_tokens=max_completion_tokens,
    )
