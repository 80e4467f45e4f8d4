"""Losses with more than one anchor: samples of several past policies, divergences from several references."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.estimates import Estimator, kl_estimate
from jaxrl_llm.losses.ratio import check_clip, constant_factor, log_ratio, token_share


def mixed_policy_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    behaviour_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_limit: float = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: int | None = None,
) -> Loss:
    """The clipped surrogate of ReMix, for a batch of fresh and replayed samples.

    With r = pi / pi_behaviour of a token and c = pi_old / pi_behaviour, the ratio that the update starts from:

        x = max(-A * r, -A * clip(r, c - clip_low, c + clip_high))

    Fresh samples have c = 1, where it is PPO's surrogate. ReMix takes 40% of a batch from the last two policies and two
    updates a batch, then goes on without replay from a switch step. That clip_low and clip_high are distances from c,
    not shares of it, is second-hand.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      behaviour_logprobs: under the policy that drew it.
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
    check_clip(clip_low, clip_high)
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


def convex_kl(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    share: float = 0.5,
    estimator: Estimator = "k3",
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: int | None = None,
) -> Loss:
    """Convex combination of the divergences from the reference and from the policy that the update starts from.

        x = share * kl(pi, reference) + (1 - share) * kl(pi, old)

    The estimates are back-propagated as they are; `kl_estimate` says which gradient each has. To anneal the share, use
    two terms, of share 1 and of share 0, with `annealed_share` as their coefficients.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference policy.
      old_logprobs: under the policy that the update starts from.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      share: weight of the reference.
      estimator: of both divergences.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss in nats a token as a sum and a count.

    Raises:
      ValueError: for a share outside [0, 1] or an unknown estimator.

    Reference: ReMix (2507.06892).
    Certainty: recalled
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it is a share of two divergences and must lie in [0, 1]")
    options = {"estimator": estimator, "aggregation": aggregation, "max_completion_tokens": max_completion_tokens}
    reference = kl_estimate(logprobs, reference_logprobs, mask, **options)
    old = kl_estimate(logprobs, old_logprobs, mask, **options)
    return reference._replace(numerator=share * reference.numerator + (1 - share) * old.numerator)


def annealed_share(
    step: Int[Array, ""] | int,
    *,
    scale: float = 0.01,
    start_step: int = 50,
    steps_per_drop: int = 10,
    drop: float = 0.1,
    least: float = 0.5,
    complement: bool = False,
) -> Float[Array, ""]:
    """Coefficient of one anchor of a convex combination whose share of the reference falls with the steps.

        share = max(1 - drop * ceil(max(step - start_step, 0) / steps_per_drop), least)
        coefficient = scale * (1 - share) if `complement`, else scale * share

    Args:
      step: updates made so far.
      scale: coefficient of the whole combination.
      start_step: step up to which the share is 1.
      steps_per_drop: steps between two drops.
      drop: how much the share falls each time.
      least: where it stops.
      complement: the coefficient of the other anchor.

    Returns:
      A coefficient for a loss term.

    Raises:
      ValueError: for a share outside [0, 1], or drops that are not positive or not apart.

    Reference: ReMix (2507.06892).
    Certainty: recalled
    """
    if not 0 <= least <= 1 or drop < 0 or steps_per_drop < 1:
        raise ValueError(
            f"least is {least}, drop {drop}, steps_per_drop {steps_per_drop}; least must lie in [0, 1], drop be at "
            "least 0 and steps_per_drop at least 1"
        )
    late = jnp.maximum(jnp.asarray(step, jnp.float32) - start_step, 0.0)
    share = jnp.maximum(1.0 - drop * jnp.ceil(late / steps_per_drop), least)
    return scale * (1.0 - share if complement else share)
