"""Entropy held at a target by imitating right answers sampled at a higher or a lower temperature."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.ranges import NonNegative, Positive, ranged
from jaxrl_llm.statistics import sampled_entropy


def steered_advantages(
    advantages: Float[Array, "B T"], extra: Bool[Array, "B"], mask: Float[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, "B T"]:
    """Advantages with 1 on every token of an extra answer.

    Args:
      advantages: advantage of each token.
      extra: True on answers drawn at the steering temperature.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    chex.assert_rank([advantages, extra, mask, weight], [2, 1, 2, 1])
    steered = jnp.where(extra.astype(bool)[:, None], 1.0, advantages.astype(jnp.float32))
    return jnp.where((mask > 0) & (weight > 0)[:, None], steered, 0.0)


@ranged
def entropy_mixed_advantages(
    advantages: Float[Array, "B T"],
    correct: Float[Array, "B"],
    old_logprobs: Float[Array, "B T"],
    tempered_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    target: NonNegative = 0.5,
    largest_gap: NonNegative = 0.1,
    log_ratio_limit: Positive = 20.0,
) -> Float[Array, "B T"]:
    """AEPO without extra samples: ordinary right answers, reweighted to the steering temperature.

        a0 = min(|target - H|, largest_gap) / share of right answers,   a = a0 / (a0 + 1)
        A <- (1 - a) * A + a * correct * pi_tempered / pi

    with H the entropy of the batch and pi_tempered the policy at `steering_temperature(H)`. A batch without right
    answers keeps its advantages.

    Args:
      advantages: advantage of each token.
      correct: 1 for a right answer, 0 for a wrong one.
      old_logprobs: log-probability of each token under the policy that the update starts from.
      tempered_logprobs: under the same policy at the steering temperature.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      target: entropy to hold, in nats per token.
      largest_gap: upper bound of |target - H|, in nats per token.
      log_ratio_limit: bound of the log-ratio before exp.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for a negative gap.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    chex.assert_rank([advantages, old_logprobs, tempered_logprobs, mask, correct, weight], [2, 2, 2, 2, 1, 1])
    chex.assert_equal_shape([advantages, old_logprobs, tempered_logprobs, mask])
    counted = (mask > 0) & (weight > 0)[:, None]
    weights = jnp.where(weight > 0, weight.astype(jnp.float32), 0.0)
    right = jnp.where(correct > 0, weights, 0.0)
    entropy = sampled_entropy(old_logprobs, mask, weight)
    some = right.sum() > 0
    share = jnp.where(some, right.sum() / jnp.where(some, weights.sum(), 1.0), 1.0)
    raw = jnp.where(some, jnp.minimum(jnp.abs(target - entropy), largest_gap) / share, 0.0)
    mixing = raw / (raw + 1)
    difference = jnp.where(counted, tempered_logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32), 0.0)
    ratio = jnp.exp(jnp.clip(difference, -log_ratio_limit, log_ratio_limit))
    imitated = jnp.where((correct > 0)[:, None], ratio, 0.0)
    return jnp.where(counted, (1 - mixing) * advantages.astype(jnp.float32) + mixing * imitated, 0.0)
