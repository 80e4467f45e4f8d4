"""A fixed number of rollouts shared out by what they are worth: a knapsack with a concave value for each prompt."""

from __future__ import annotations

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Count, OpenShare, ranged


def mixed_probability(samples: Float[Array, "*N"], success: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Probability that a group holds right and wrong samples: 1 - p^N - (1 - p)^N.

    Args:
      samples: N.
      success: p, the chance of a right sample.

    Reference: Knapsack RL (2509.25849).
    Certainty: verified
    """
    return 1.0 - success**samples - (1.0 - success) ** samples


def rollout_value(samples: Float[Array, "*N"], success: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """What N rollouts of a prompt are worth: (1 - p^N - (1 - p)^N) p (1 - p)^2, and 0 where p is 0 or 1.

    The second factor is the first-order gain of one gradient step; it is largest at p = 1 / 3.

    Args:
      samples: N.
      success: p, the chance of a right sample.

    Reference: Knapsack RL (2509.25849).
    Certainty: verified
    """
    return mixed_probability(samples, success) * success * (1.0 - success) ** 2


@ranged
def rollouts_for_signal(
    success: Float[Array, "*N"], *, rule: Literal["probability", "expectation"] = "probability", alpha: OpenShare = 0.9
) -> Float[Array, "*N"]:
    """Rollouts until a group of 0 < p < 1 is mixed.

        probability   log(1 - alpha) / log(max(p, 1 - p))    mixed with probability about alpha
        expectation   1 / (p (1 - p)) - 1                    the expected number

    Infinite where p is 0 or 1.

    Args:
      success: p.
      rule: which of the two.
      alpha: of the first.

    Raises:
      ValueError: for an unknown rule, or an alpha outside (0, 1).

    Reference: Knapsack RL (2509.25849).
    Certainty: verified
    """
    if rule not in ("probability", "expectation"):
        raise ValueError(f"rule is {rule!r}; it must be 'probability' or 'expectation'")
    mixed = (success > 0) & (success < 1)
    inside = jnp.where(mixed, success, 0.5)
    if rule == "probability":
        cost = math.log1p(-alpha) / jnp.log(jnp.maximum(inside, 1 - inside))
    else:
        cost = 1.0 / (inside * (1 - inside)) - 1.0
    return jnp.where(mixed, cost, jnp.inf)


@ranged
def knapsack_rollouts(
    success: Float[Array, "N"],
    seen: Bool[Array, "N"],
    *,
    samples_per_prompt: Count,
    least: Count = 2,
    most: Count = 128,
    rule: Literal["probability", "expectation"] = "probability",
    alpha: OpenShare = 0.9,
) -> Int[Array, "N"]:
    """How many rollouts each prompt of a batch gets; they add up to N * samples_per_prompt.

    A prompt that was not seen yet gets `samples_per_prompt`, one that was always or never right `least`, the others
    `least` and what maximises the sum of `rollout_value` over them, at most `most`. The value is concave, so giving one
    rollout after the other to the largest gain is exact; ties go to the first. Rollouts that the mixed prompts cannot
    use (more than `rollouts_for_signal` of each) are spread evenly over the prompts that were never right, or if there
    are none over those that always were.

    Args:
      success: share of right samples at the last visit.
      seen: whether there was one.
      samples_per_prompt: the mean.
      least: rollouts of every prompt that was seen.
      most: rollouts of a mixed prompt.
      rule, alpha: as for `rollouts_for_signal`.

    Raises:
      ValueError: unless 1 <= least <= samples_per_prompt <= most.

    Reference: Knapsack RL (2509.25849).
    Certainty: verified
    """
    chex.assert_equal_shape([success, seen])
    if not 1 <= least <= samples_per_prompt <= most:
        raise ValueError(
            f"least is {least}, samples_per_prompt {samples_per_prompt} and most {most}; they must be in this order, "
            "and at least 1"
        )
    success = success.astype(jnp.float32)
    never, always = seen & (success <= 0), seen & (success >= 1)
    mixed = seen & ~never & ~always
    start = jnp.where(seen, least, samples_per_prompt)
    left = success.shape[0] * samples_per_prompt - start.sum()

    useful = jnp.floor(jnp.minimum(most, rollouts_for_signal(success, rule=rule, alpha=alpha)))
    useful = jnp.sum(jnp.where(mixed, useful, 0.0)).astype(jnp.int32)
    takers = jnp.where(jnp.any(never), never, always & jnp.any(mixed))
    surplus = jnp.where(jnp.any(takers), jnp.where(jnp.any(mixed), jnp.maximum(left - useful, 0), left), 0)
    left = left - surplus

    def one(index, extra):
        gain = rollout_value(least + extra + 1.0, success) - rollout_value(least + extra + 0.0, success)
        open_ = mixed & (extra < most - least)
        chosen = jnp.argmax(jnp.where(open_, gain, -jnp.inf))
        return extra.at[chosen].add(((index < left) & jnp.any(open_)).astype(extra.dtype))

    extra = jax.lax.fori_loop(0, success.shape[0] * samples_per_prompt, one, jnp.zeros(success.shape, jnp.int32))
    counts = start + _evenly(surplus, takers) + extra + _evenly(left - extra.sum(), mixed)
    # With neither a mixed prompt nor one that was never right there is nothing to choose.
    return jnp.where(jnp.any(mixed | never), counts, samples_per_prompt)


def _evenly(total: Int[Array, ""], takers: Bool[Array, "N"]) -> Int[Array, "N"]:
    """Shares of a number that differ by at most one; the first ones get the remainder."""
    count = jnp.maximum(jnp.sum(takers), 1)
    rank = jnp.cumsum(takers) - 1
    shares = total // count + (rank < total % count)
    return jnp.where(takers, shares, 0).astype(jnp.int32)
