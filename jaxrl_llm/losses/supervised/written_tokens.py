"""Losses on tokens that the policy did not sample: demonstrations, and stored answers of an earlier policy."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss, Source
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.divergences.divergence import divergence
from jaxrl_llm.losses.ratio import constant_factor, log_ratio, on_mask, pessimistic_surrogate, token_share
from jaxrl_llm.losses.supervised.likelihood import negative_log_likelihood
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged


@ranged
def external_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    source: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    gamma: NonNegative = 0.5,
    clip_low: NonNegative | None = None,
    clip_high: NonNegative | None = None,
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """A surrogate for groups of samples and demonstrations, with more weight on unlikely tokens of demonstrations.

        sampled         x = -A * r, or PPO's clipped form where a clip range is given
        demonstration   x = -A * s * sg(1 - pi)^gamma,   s = 2 pi / (pi_old + omega),  omega = (pi_old + 1) / 2

    with r = pi / pi_old. The distribution of demonstrations is unknown; omega is the mean of the old policy and one
    with probability 1 on the token, so s is at most 4. The gradient of s goes through its numerator.

    Rewards are compared within the group, demonstration included: `group_normalized: {scale: none}`. A prompt without
    a solved sample still learns from its demonstration.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from, for tokens of demonstrations too.
      advantages: advantage of each token.
      source: origin of each token; `Source.DEMONSTRATION` marks external ones.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a constant factor on each token's loss; None is 1.
      gamma: exponent that favours unlikely tokens of a demonstration; 0 weighs all equally.
      clip_low: how far the ratio of a sampled token may fall below 1; None, as in the released run, does not clip.
      clip_high: how far it may rise above 1; given together with `clip_low`.
      log_ratio_limit: bound of |log r| before exp.
      aggregation: how token losses are averaged; the released run divides their sum by the longest completion, which
        is token_sum_const with `max_completion_tokens` (and a sum over rows that grows with the batch).
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metrics `external_share` (tokens of demonstrations) and, with a clip range, `clip_share`.

    Raises:
      ValueError: for a negative gamma or clip range, or one clip bound without the other.

    Reference: RL-PLUS (2508.00222).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, advantages, source, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, source, mask])
    if (clip_low is None) != (clip_high is None):
        raise ValueError(f"clip_low is {clip_low} and clip_high is {clip_high}; give both, or neither for no clipping")
    signal = constant_factor(advantages, mask)
    external = (source == Source.DEMONSTRATION) & (mask > 0)
    metrics = {"external_share": token_share(external, mask)}
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=log_ratio_limit))
    if clip_low is None or clip_high is None:
        own = -signal * ratio
    else:
        own, clipped = pessimistic_surrogate(ratio, signal, clip_low=clip_low, clip_high=clip_high)
        metrics["clip_share"] = token_share(clipped & ~external, mask)
    lp = on_mask(logprobs, mask)
    probability = jnp.exp(jnp.where(lp > 0, 0.0, lp))
    old_probability = jnp.exp(jnp.minimum(on_mask(old_logprobs, mask), 0.0))
    mixed = 2 * probability / stop_gradient(1.5 * old_probability + 0.5)
    unlikely = jnp.maximum(1 - stop_gradient(probability), 0.0) ** gamma
    per_token = jnp.where(external, -signal * mixed * unlikely, own)
    if token_weight is not None:
        per_token = per_token * constant_factor(token_weight, mask)
    loss = aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics=metrics)


@ranged
def rehearsal_divergence(
    *,
    generator: str = "forward_kl",
    alpha: float = 0.5,
    value_limit: Positive | None = 10.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Callable[..., Loss]:
    """A divergence from the policy that generated stored answers, on those answers only.

        D_f(policy || reference) = mean of f(u) over stored tokens,   u = pi / pi_reference

    Rows of stored answers share a batch with rollouts, but their `mask` is 0, so other losses leave them out; this loss
    reads `written_mask`. Each part has its own mean. No reference model runs: `stored_logprobs`, of the policy that
    generated an answer, are stored with it.

    forward_kl is DPH-F (0 at the start, with a gradient only on tokens whose probability has changed); jensen_shannon
    with twice the coefficient is DPH-JS; alpha with order alpha = 1 - a is its alpha form. `near_perfect_groups`
    selects the prompts.

    Args:
      generator: generator of the divergence.
      alpha: order of generator 'alpha'.
      value_limit: largest value of one token, without gradient beyond; None is no limit.
      aggregation: how token values are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      A loss of (logprobs, stored_logprobs, written_mask).

    Raises:
      ValueError: for an unknown generator or a value limit that is not positive.

    Reference: DPH-RL (2509.07430).
    Certainty: verified
    """
    on_stored = divergence(
        generator=generator,
        samples="reference",
        alpha=alpha,
        value_limit=value_limit,
        aggregation=aggregation,
        max_completion_tokens=max_completion_tokens,
    )

    def stored_divergence(
        logprobs: Float[Array, "B T"],
        stored_logprobs: Float[Array, "B T"],
        written_mask: Float[Array, "B T"],
    ) -> Loss:
        return on_stored(logprobs, stored_logprobs, written_mask)

    return stored_divergence


@ranged
def stored_likelihood(
    logprobs: Float[Array, "B T"],
    written_mask: Float[Array, "B T"],
    *,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Cross-entropy of demonstrations that share a batch with samples: a supervised term beside a policy loss.

        x = -log pi    on tokens of demonstrations, each row with its weight

    Like `rehearsal_divergence` it reads `written_mask`, since the mask of such rows is 0.

    Args:
      logprobs: log-probability of each token under the current policy.
      written_mask: 0 on tokens that do not count, the row's weight on written ones.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count.

    Reference: AMFT (2508.06944).
    Certainty: verified
    """
    return negative_log_likelihood(
        logprobs, written_mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens
    )
