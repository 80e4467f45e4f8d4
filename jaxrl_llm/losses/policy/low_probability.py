"""Protection of rare but plausible tokens of bad answers, whose probability a policy gradient would drive to 0."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.divergences.divergence import LEAST_LOGPROB
from jaxrl_llm.losses.ratio import constant_factor, log_ratio, on_mask, pessimistic_surrogate, token_share
from jaxrl_llm.ranges import Count, NonNegative, Positive, PositiveShare, Share, ranged


@ranged
def min_p_logprobs(
    log_probabilities: Float[Array, "*B V"], tokens: Int[Array, "*B"], *, min_p: Share = 0.02
) -> Float[Array, "*B"]:
    """Log-probability of tokens under a policy without its implausible symbols.

        kept symbols: p_v >= min_p * max_v p_v, renormalised; a token that is not kept has -1e4

    Args:
      log_probabilities: log-softmax of a policy over the vocabulary, such as one chunk of the scoring pass.
      tokens: the symbol to score at each position.
      min_p: share of the largest probability that a symbol must reach to be kept.

    Returns:
      The proxy's log-probability of each token, never below the policy's own for a kept token.
    """
    log_p = log_probabilities.astype(jnp.float32)
    threshold = jnp.max(log_p, axis=-1) + jnp.log(min_p)
    kept = log_p >= threshold[..., None]
    total = jax.nn.logsumexp(jnp.where(kept, log_p, -jnp.inf), axis=-1)
    token = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(token >= threshold, token - total, LEAST_LOGPROB)


@ranged
def lowest_token_proxy(
    proxy_logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    share: PositiveShare = 0.01,
) -> Float[Array, "B T"]:
    """The proxy's log-probabilities, kept for the least probable tokens of bad answers only.

    Of the n tokens of the batch with a negative advantage, the k = max(1, floor(share * n)) least probable keep their
    value (including all ties of the k-th); the others get -1e4, which `protected_surrogate` never protects. k = 1 keeps
    none, as in the released code. That code counts over a microbatch of current probabilities; here it is the batch
    before the update, so that any split trains on the same tokens.

    Args:
      proxy_logprobs: log-probability of each token under the proxy (`min_p_logprobs`).
      old_logprobs: log-probability of each token under the policy that the update starts from.
      advantages: advantage of each token.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      share: share of the tokens with a negative advantage that is protected.

    Returns:
      The new `proxy_logprobs`.

    Raises:
      ValueError: for a share outside (0, 1].

    Reference: Lp-Reg (2510.03222).
    Certainty: verified
    """
    chex.assert_rank([proxy_logprobs, old_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([proxy_logprobs, old_logprobs, advantages, mask])
    bad = (mask > 0) & (weight > 0)[:, None] & (advantages < 0)
    # The slack keeps an exact product such as 0.01 * 300, which float32 has a little below 3, from being rounded down.
    k = jnp.maximum(jnp.floor(share * bad.sum().astype(jnp.float32) * (1 + 1e-6)), 1.0).astype(jnp.int32)
    candidates = jnp.where(bad, old_logprobs.astype(jnp.float32), jnp.inf)
    threshold = jnp.sort(candidates.ravel())[k - 1]
    chosen = bad & (candidates <= threshold) & (k > 1)
    return stop_gradient(jnp.where(chosen, proxy_logprobs.astype(jnp.float32), LEAST_LOGPROB))


@ranged
def protected_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    proxy_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    kl_coefficient: NonNegative = 1.0,
    clip_low: NonNegative = 1.0,
    clip_high: NonNegative = 9.0,
    value_limit: Positive = 10.0,
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """A loosely clipped surrogate with a KL term on bad tokens whose probability fell below that of a proxy.

        x = max(-A * r, -A * clip(r, 1 - clip_low, 1 + clip_high))
        where A < 0 and log pi < log proxy:
            x = -A * r + kl_coefficient * (exp(d) - d - 1),   d = log proxy - log pi

    The added term is the k3 estimate of a KL from the proxy. As in the released code it is limited to `value_limit`,
    beyond which it has no gradient. The tokens that can be protected are chosen once per batch by `lowest_token_proxy`.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      advantages: advantage of each token.
      proxy_logprobs: under the old policy without its implausible symbols; -1e4 where a token is not to be protected.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a constant factor on each token's loss; None is 1.
      kl_coefficient: weight of the added term.
      clip_low: how far the ratio may fall below 1; 1 is no lower bound.
      clip_high: how far it may rise above 1.
      value_limit: the largest added value of a token, in nats.
      log_ratio_limit: bound of |log r| and |d| before exp.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metrics `clip_share` and `protected_share` (tokens with the added term).

    Raises:
      ValueError: for a negative clip range or coefficient, or a limit that is not positive.

    Reference: Lp-Reg (2510.03222).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, proxy_logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, proxy_logprobs, mask])
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=log_ratio_limit))
    signal = constant_factor(advantages, mask)
    per_token, clipped = pessimistic_surrogate(ratio, signal, clip_low=clip_low, clip_high=clip_high)
    lp, proxy = on_mask(logprobs, mask), stop_gradient(on_mask(proxy_logprobs, mask))
    protected = (signal < 0) & (lp < proxy)
    d = jnp.clip(proxy - lp, -log_ratio_limit, log_ratio_limit)
    pull = jnp.minimum(jnp.expm1(d) - d, value_limit)
    per_token = jnp.where(protected, -signal * ratio + kl_coefficient * pull, per_token)
    if token_weight is not None:
        per_token = per_token * constant_factor(token_weight, mask)
    metrics = {
        "clip_share": token_share(clipped & ~protected, mask),
        "protected_share": token_share(protected, mask),
    }
    loss = aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics=metrics)
