"""Entropy held at a target by what is imitated: right answers drawn hotter, or colder, than the policy."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages.whitening import token_weights
from jaxrl_llm.experience import Method


def sampled_entropy(
    old_logprobs: Float[Array, "B T"], mask: Float[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, ""]:
    """Entropy in nats a token, estimated by -log pi of the tokens drawn; 0 where there are none."""
    chex.assert_rank([old_logprobs, mask, weight], [2, 2, 1])
    counts = token_weights(mask, weight)
    surprise = jnp.where(counts > 0, -old_logprobs.astype(jnp.float32), 0.0)
    total = counts.sum()
    return (counts * surprise).sum() / jnp.where(total > 0, total, 1.0)


def steering_temperature(
    entropy: Float[Array, ""] | float, *, target: float = 0.5, cold: float = 0.8, hot: float = 1.2
) -> Float[Array, ""]:
    """Temperature at which the extra answers are drawn: `hot` where the entropy is at most the target, else `cold`.

    >>> [round(float(steering_temperature(h)), 1) for h in (0.3, 0.7)]
    [1.2, 0.8]

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    if not 0 < cold < hot:
        raise ValueError(f"cold is {cold} and hot is {hot}; they are temperatures and must satisfy 0 < cold < hot")
    return jnp.where(jnp.asarray(entropy) <= target, hot, cold).astype(jnp.float32)


def temperature_controller(*, target: float = 0.5, cold: float = 0.8, hot: float = 1.2) -> Method:
    """AEPO's temperature for the extra answers of the next step, from the entropy of this one.

    Before the first step the entropy counts as 0, so the first temperature is `steering_temperature(0)`.

    Args:
      target: entropy to hold, in nats a token (0.25 to 0.75 in the paper).
      cold: temperature that lowers the entropy.
      hot: temperature that raises it.

    Returns:
      A method that remembers the entropy; its update gives the temperature of the next rollout.

    Raises:
      ValueError: for temperatures that are not positive or not in order.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    steering_temperature(0.0, target=target, cold=cold, hot=hot)

    def init():
        return {"entropy": jnp.float32(0.0)}

    def update(memory, old_logprobs: Float[Array, "B T"], mask: Float[Array, "B T"], weight: Float[Array, "B"]):
        del memory  # an empty batch has entropy 0, like no batch at all
        entropy = sampled_entropy(old_logprobs, mask, weight)
        return steering_temperature(entropy, target=target, cold=cold, hot=hot), {"entropy": entropy}

    return Method(init, update)


def steered_batch(*, target: float = 0.5, cap: int = 60, threshold: float = 0.05) -> Method:
    """Weights that put good extra answers in the place of as many rows of the batch: AEPO.

    Of the extra answers (drawn at the steering temperature, each prompt's a group of its own) those with an advantage
    above `threshold` qualify. n = min(cap, how many qualify), halved and rounded down where the entropy of the step
    before was above the target. The first n of them are kept and the first n other rows leave, so that the batch keeps
    its size. Then `steered_advantages` sets the advantage of the extra answers to 1.

    Args:
      target: entropy to hold, in nats a token.
      cap: most answers that are exchanged.
      threshold: least advantage of an extra answer.

    Returns:
      A method that remembers the entropy of the rows it kept; its update gives the new weight of each row, from the
      advantages within each group and from `extra`, which is True on extra answers.

    Raises:
      ValueError: for a negative cap.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    if cap < 0:
        raise ValueError(f"cap is {cap}; it is a number of answers and must be at least 0")

    def init():
        return {"entropy": jnp.float32(0.0)}

    def update(
        memory,
        advantages: Float[Array, "B T"],
        extra: Bool[Array, "B"],
        old_logprobs: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
    ):
        chex.assert_rank([advantages, extra, mask, weight], [2, 1, 2, 1])
        there, extra = weight > 0, extra.astype(bool)
        largest = jnp.max(jnp.where(mask > 0, advantages.astype(jnp.float32), -jnp.inf), axis=-1)
        qualifies = there & extra & (largest > threshold)
        exchanged = jnp.minimum(qualifies.sum(), cap)
        exchanged = jnp.where(memory["entropy"] > target, exchanged // 2, exchanged)
        ordinary = there & ~extra
        kept = qualifies & (jnp.cumsum(qualifies) <= exchanged)
        stays = ordinary & (jnp.cumsum(ordinary) > exchanged)
        new = jnp.where(kept | stays, weight.astype(jnp.float32), 0.0)
        return new, {"entropy": sampled_entropy(old_logprobs, mask, new)}

    return Method(init, update)


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
      One advantage a token, 0 outside the mask and in absent rows.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    chex.assert_rank([advantages, extra, mask, weight], [2, 1, 2, 1])
    steered = jnp.where(extra.astype(bool)[:, None], 1.0, advantages.astype(jnp.float32))
    return jnp.where((mask > 0) & (weight > 0)[:, None], steered, 0.0)


def entropy_mixed_advantages(
    advantages: Float[Array, "B T"],
    correct: Float[Array, "B"],
    old_logprobs: Float[Array, "B T"],
    tempered_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    target: float = 0.5,
    largest_gap: float = 0.1,
    log_ratio_limit: float = 20.0,
) -> Float[Array, "B T"]:
    """AEPO without extra samples: the ordinary right answers stand in for those of another temperature.

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
      target: entropy to hold, in nats a token.
      largest_gap: most that the distance from the target counts, in nats a token.
      log_ratio_limit: bound of the log-ratio before exp.

    Returns:
      One advantage a token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for a negative gap.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    chex.assert_rank([advantages, old_logprobs, tempered_logprobs, mask, correct, weight], [2, 2, 2, 2, 1, 1])
    chex.assert_equal_shape([advantages, old_logprobs, tempered_logprobs, mask])
    if largest_gap < 0:
        raise ValueError(f"largest_gap is {largest_gap}; it bounds a distance and must be at least 0")
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
