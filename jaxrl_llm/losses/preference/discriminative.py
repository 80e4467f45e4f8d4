"""Discriminative objectives: raise the score of right answers above that of the wrong ones of the same prompt."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.losses.siblings import compact_ids, mean_weight, sibling_max, sibling_sum
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged


@ranged
def decoupled_reward(
    logprobs: Float[Array, "B T"],
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    max_completion_tokens: Count,
    temperature: Positive = 10.0,
    length_temperature: Positive | None = 0.1,
) -> Loss:
    """DRPO: right answers against wrong ones, with a length preference among the right ones only.

        s_i = mean_t log pi of answer i
        omega_i = exp((1 - length_i / L) / length_temperature) over right answers, normalised within the prompt
        J = sum_right omega_i * s_i - temperature * log mean_wrong exp(s_j / temperature)
        loss = -mean over prompts of J

    A prompt without both kinds adds 0 and counts as a prompt. A long right answer has a smaller positive gradient than
    a short one, never a negative one. With length_temperature None all right answers have equal weight (DisCO with the
    log-likelihood score). Use with the trust region around the old policy, `group_trust_region`.

    Args:
      logprobs: log-probability of each token under the current policy.
      correct: 1 for a right answer, 0 for a wrong one.
      length: completion tokens of each row.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      max_completion_tokens: L, fixed for a whole run (never the padded length of a bucket).
      temperature: tau, in nats per token; small values select the most likely wrong answer.
      length_temperature: small values select the shortest right answer; None is no preference.

    Returns:
      The loss; its count is the (weighted) number of prompts.

    Raises:
      ValueError: for a length limit or temperature that is not positive.

    Reference: DRPO (2510.04474); DisCO (2505.12366).
    Certainty: verified
    """
    chex.assert_rank([logprobs, correct, length, group, mask], [2, 1, 1, 1, 2])
    chex.assert_equal_shape([logprobs, mask])
    weights, ids = row_weight(mask.astype(jnp.float32)), compact_ids(group)
    score = on_mask(logprobs, mask).sum(-1) / jnp.maximum((mask > 0).sum(-1), 1)
    right = jnp.where((correct > 0), weights, 0.0)
    wrong = weights - right
    contrast = (sibling_sum(right, ids) > 0) & (sibling_sum(wrong, ids) > 0)

    preference = jnp.zeros_like(score)
    if length_temperature is not None:
        preference = (1 - length.astype(jnp.float32) / max_completion_tokens) / length_temperature
    omega = _normalised(preference, right, ids)
    raised = sibling_sum(omega * score, ids)
    # Subtract the largest score, which cancels in value and in gradient.
    highest = jax.lax.stop_gradient(sibling_max(jnp.where(wrong > 0, score, -jnp.inf), ids))
    highest = jnp.where(contrast, highest, 0.0)
    gap = jnp.where(contrast & (wrong > 0), score - highest, 0.0)
    mean_exp = sibling_sum(wrong * jnp.exp(gap / temperature), ids) / jnp.where(contrast, sibling_sum(wrong, ids), 1.0)
    lowered = highest + temperature * jnp.log(jnp.where(contrast, mean_exp, 1.0))

    # Every row holds its group's objective, so each row gets an equal share of it.
    rows = sibling_sum((weights > 0).astype(jnp.float32), ids)
    share = jnp.where(weights > 0, mean_weight(weights, ids) / jnp.maximum(rows, 1.0), 0.0)
    objective = jnp.where(contrast, raised - lowered, 0.0)
    return Loss(-(share * objective).sum(), share.sum())


@ranged
def group_trust_region(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    threshold: NonNegative = 1e-4,
    strength: NonNegative = 1e3,
    log_ratio_limit: Positive = 20.0,
) -> Loss:
    """Penalty on the divergence from the old policy beyond a threshold, the trust region of DRPO and DisCO.

        K = mean over the tokens of a prompt of log pi_old - log pi
        loss = mean over tokens of sg(max(strength * (K - threshold), 0)) * K

    The release takes one K of the whole batch. Such a statistic of the current policy cannot be summed over parts of a
    batch, so K is per prompt here; with one prompt both agree, with several this form is stricter.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      threshold: divergence without penalty, in nats per token.
      strength: slope of the coefficient.
      log_ratio_limit: bound of |log pi - log pi_old|.

    Returns:
      The loss as a sum and a count of tokens.

    Raises:
      ValueError: for a negative threshold or strength.

    Reference: DRPO (2510.04474); DisCO (2505.12366).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, mask, group], [2, 2, 2, 1])
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    mask, ids = mask.astype(jnp.float32), compact_ids(group)
    difference = on_mask(old_logprobs, mask) - on_mask(logprobs, mask)
    difference = jnp.clip(difference, -log_ratio_limit, log_ratio_limit)
    rows = (mask * difference).sum(-1)
    tokens = sibling_sum(mask.sum(-1), ids)
    divergence = jax.lax.stop_gradient(sibling_sum(rows, ids)) / jnp.where(tokens > 0, tokens, 1.0)
    coefficient = jnp.maximum(strength * (divergence - threshold), 0.0)
    return Loss((coefficient * rows).sum(), mask.sum())


def _normalised(logits: Array, weights: Array, ids: Array) -> Array:
    """Weighted softmax within each group over the rows of positive weight, 0 on the others."""
    among = weights > 0
    largest = sibling_max(jnp.where(among, logits, -jnp.inf), ids)
    terms = weights * jnp.exp(jnp.where(among, logits - jnp.where(jnp.isfinite(largest), largest, 0.0), 0.0))
    total = sibling_sum(terms, ids)
    return terms / jnp.where(total > 0, total, 1.0)
