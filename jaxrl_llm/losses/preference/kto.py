"""Kahneman-Tversky optimisation: single answers labelled good or bad, without pairs."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss, Sequences
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.ranges import NonNegative, Positive, ranged


@ranged
def kto(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    preferred: Float[Array, "B"],
    kl_anchor: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Loss:
    """KTO: raises good answers and lowers bad ones relative to the policy's mean log-ratio.

    With rho = sum_t(log pi - log pi_reference) of an answer and z = sg(kl_anchor), filled by `mismatched_kl`:

        good   x = w_good * (1 - sigmoid(beta * (rho - z)))
        bad    x = w_bad * (1 - sigmoid(beta * (z - rho)))

    averaged over answers. The gradient is largest where rho is near z and vanishes on either side, so a wrong label has
    little effect where |rho - z| is large. Keep w_good * n_good / (w_bad * n_bad) between 1 and 4/3.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      preferred: 1 for a good answer, 0 for a bad one; any other number leaves the row out.
      kl_anchor: z of each row, in nats.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      beta: units of value per nat.
      desirable_weight: w_good.
      undesirable_weight: w_bad.

    Returns:
      The loss; its count is the (weighted) number of answers. Metrics: `desirable_log_ratio` and
      `undesirable_log_ratio` (rho of either kind), and `kl_anchor`.

    Raises:
      ValueError: for a beta that is not positive, or a negative weight.

    Reference: KTO (2402.01306).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask, preferred, kl_anchor], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([logprobs, reference_logprobs, mask])
    mask = mask.astype(jnp.float32)
    rho = (on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))).sum(-1)
    weights = row_weight(mask)
    good, bad = (jnp.where(preferred == kind, weights, 0.0) for kind in (1, 0))
    z = jax.lax.stop_gradient(kl_anchor.astype(jnp.float32))
    away = jnp.where(good > 0, 1.0, -1.0) * (rho - z)
    factor = desirable_weight * good + undesirable_weight * bad
    counted = good + bad
    metrics = {
        "desirable_log_ratio": ((good * rho).sum(), good.sum()),
        "undesirable_log_ratio": ((bad * rho).sum(), bad.sum()),
        "kl_anchor": (jnp.where(counted > 0, counted * z, 0.0).sum(), counted.sum()),
    }
    # 1 - sigmoid(x) without its cancellation.
    loss = jnp.where(factor > 0, factor * jax.nn.sigmoid(-beta * away), 0.0)
    return Loss(loss.sum(), counted.sum(), metrics)


def mismatched_completions(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
) -> Sequences:
    """A view for KTO: each prompt with the completion of the preceding row, the first with that of the last.

    The rotation is within the rows scored together: with `training.sequences_per_microbatch`, those of a microbatch.

    Args:
      prompt_tokens, prompt_length: prompt of each row.
      tokens, length: completion of each row.

    Returns:
      The mismatched sequences, one per row.

    Raises:
      ValueError: for a single row, which has no other completion.

    Reference: KTO (2402.01306).
    Certainty: verified
    """
    chex.assert_rank([prompt_tokens, prompt_length, tokens, length], [2, 1, 2, 1])
    if tokens.shape[0] < 2:
        raise ValueError(
            "mismatched_completions got a single row, which has no other completion; score at least 2 rows at once "
            "(training.sequences_per_microbatch)"
        )
    tokens, length = jnp.roll(tokens, 1, axis=0), jnp.roll(length, 1)
    mask = (jnp.arange(tokens.shape[1]) < length[:, None]).astype(jnp.float32)
    return Sequences(prompt_tokens, prompt_length, tokens, length, mask)


def mismatched_kl(
    old_mismatch_logprobs: Float[Array, "B T"],
    reference_mismatch_logprobs: Float[Array, "B T"],
    mismatch_mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
) -> Float[Array, "B"]:
    """KTO's estimate of the KL from the reference, from prompts with completions of other prompts.

        z = max(0, mean over rows of sum_t(log pi_old - log pi_reference))

    One number for the whole batch, without gradient. With one update per batch pi_old is the policy that is trained.

    Args:
      old_mismatch_logprobs: of the view `mismatch: mismatched_completions`, under the policy before the update.
      reference_mismatch_logprobs: under the reference.
      mismatch_mask: 1 on tokens of the view.
      weight: of each row.

    Returns:
      z on every row, for the field `kl_anchor`.

    Reference: KTO (2402.01306).
    Certainty: verified
    """
    chex.assert_rank([old_mismatch_logprobs, reference_mismatch_logprobs, mismatch_mask, weight], [2, 2, 2, 1])
    difference = on_mask(old_mismatch_logprobs, mismatch_mask) - on_mask(reference_mismatch_logprobs, mismatch_mask)
    weight = weight.astype(jnp.float32)
    total = weight.sum()
    mean = jnp.where(weight > 0, weight * difference.sum(-1), 0.0).sum() / jnp.where(total > 0, total, 1.0)
    return jnp.full(weight.shape, jnp.maximum(mean, 0.0))
