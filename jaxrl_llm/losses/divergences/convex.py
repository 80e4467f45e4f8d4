"""Divergences from several references at once."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation
from jaxrl_llm.losses.divergences.estimates import Estimator, kl_estimate
from jaxrl_llm.ranges import Count, Share, ranged


@ranged
def convex_kl(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    share: Share = 0.5,
    estimator: Estimator = "k3",
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Convex combination of the divergences from the reference and from the policy that the update starts from.

        x = share * kl(pi, reference) + (1 - share) * kl(pi, old)

    The estimates are differentiated directly; `kl_estimate` states the gradient of each. To anneal the share, use two
    terms, of share 1 and of share 0, with `annealed_share` as their coefficients.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference policy.
      old_logprobs: under the policy that the update starts from.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      share: weight of the divergence from the reference.
      estimator: of both divergences.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss in nats per token as a sum and a count.

    Raises:
      ValueError: for a share outside [0, 1] or an unknown estimator.

    Reference: ReMix (2507.06892).
    Certainty: recalled
    """
    options = {"estimator": estimator, "aggregation": aggregation, "max_completion_tokens": max_completion_tokens}
    reference = kl_estimate(logprobs, reference_logprobs, mask, **options)
    old = kl_estimate(logprobs, old_logprobs, mask, **options)
    return reference._replace(numerator=share * reference.numerator + (1 - share) * old.numerator)
