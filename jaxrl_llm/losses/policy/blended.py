"""A policy loss with two advantages for each token, one from its group and one from the batch."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation
from jaxrl_llm.losses.policy.surrogates import clipped_surrogate
from jaxrl_llm.ranges import AboveOne, Count, NonNegative, Positive, ranged


@ranged
def blended_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    global_advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
    dual_clip: AboveOne | None = 3.0,
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "seq_mean_token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Sum of two clipped surrogates, each with its own advantage: the loss of COPO.

        x = surrogate(A_local) + surrogate(A_global)

    The blend weights are inside the advantages (`consistency_blended`, part local and part global), since the surrogate
    is proportional to them. While no ratio is clipped this is one surrogate of A_local + A_global; where one is clipped
    and the two differ in sign, each part has its own clip bound.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      advantages: weighted advantage of each token within its group.
      global_advantages: weighted advantage of each token within the batch.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: a constant factor on each token's loss; None is 1.
      clip_low, clip_high, dual_clip, log_ratio_limit: as in `clipped_surrogate`.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metrics `local_clip_share` and `global_clip_share`.

    Raises:
      ValueError: for a negative clip range, or a dual clip that is not above 1.

    Reference: COPO, consistency-aware policy optimisation (2508.04138).
    Certainty: verified
    """
    parts = [
        clipped_surrogate(
            logprobs,
            old_logprobs,
            signal,
            mask,
            token_weight,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            log_ratio_limit=log_ratio_limit,
            aggregation=aggregation,
            max_completion_tokens=max_completion_tokens,
        )
        for signal in (advantages, global_advantages)
    ]
    local, batch_wide = parts
    metrics = {
        "local_clip_share": local.metrics["clip_share"],
        "global_clip_share": batch_wide.metrics["clip_share"],
    }
    return local._replace(numerator=local.numerator + batch_wide.numerator, metrics=metrics)
