"""Allocation of a fixed number of rollouts over prompts: a knapsack problem with a concave value per prompt."""

from __future__ import annotations

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Count, OpenShare, ranged


def mixed_probability(samples: Float[Array, "*N"], success: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Probability that a group has right and wrong samples: 1 - p^N - (1 - p)^N.

    Args:
      samples: N.
      success: p, probability of a right sample.

    Returns:
      A probability per prompt.

    Reference: Knapsack RL (2509.25849).
    Certainty: verified
    """
    return 1.0 - success**samples - (1.0 - success) ** samples


def rollout_value(samples: Float[Array, "*N"], success: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Value of N rollouts of a prompt: (1 - p^N - (1 - p)^N) p (1 - p)^2, which is 0 where p is 0 or 1.

    The factor p (1 - p)^2 is the first-order gain of a gradient step; it is largest at p = 1 / 3.

    Args:
      samples: N.
      success: p, probability of a right sample.

    Returns:
      A value per prompt.

    Reference: Knapsack RL (2509.25849).
    Certainty: verified
    """
    return mixed_probability(samples, success) * success * (1.0 - success) ** 2


@ranged
def rollouts_for_signal(
    success: Float[Array, "*N"], *, rule: Literal["probability", "expectation"] = "probability", alpha: OpenShare = 0.9
) -> Float[Array, "*N"]:
    """Rollouts until a group has right and wrong samples, for 0 < p < 1.

        probability   log(1 - alpha) / log(max(p, 1 - p))    mixed with probability about alpha
        expectation   1 / (p (1 - p)) - 1                    expected number

    It is infinite where p is 0 or 1.

    Args:
      success: p, probability of a right sample.
      rule: as above.
      alpha: probability of the rule `probability`.

    Returns:
      A number of rollouts per prompt, not rounded.

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
    """Number of rollouts of each prompt of a batch, with sum N * samples_per_prompt.

    An unseen prompt gets `samples_per_prompt` rollouts, and a prompt with p = 0 or 1 gets `least`. A mixed prompt (0 <
    p < 1) gets between `least` and `most`, such that the sum of `rollout_value` over the mixed prompts is maximal. The
    value is concave, so greedy allocation is exact; ties go to the first prompt. Rollouts beyond `rollouts_for_signal`
    of the mixed prompts are spread evenly over the prompts with p = 0, or over those with p = 1 if there are none.

    Args:
      success: p, share of right samples at the last visit.
      seen: whether the prompt was visited.
      samples_per_prompt: mean number of rollouts.
      least: fewest rollouts of a seen prompt.
      most: most rollouts of a mixed prompt by its value.
      rule, alpha: as for `rollouts_for_signal`.

    Returns:
      A number of rollouts per prompt.

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
    # Without a seen prompt of p < 1 the allocation is uniform.
    return jnp.where(jnp.any(mixed | never), counts, samples_per_prompt)


def _evenly(total: Int[Array, ""], takers: Bool[Array, "N"]) -> Int[Array, "N"]:
    """`total` split into integers that differ by at most one; the first takers get the remainder."""
    count = jnp.maximum(jnp.sum(takers), 1)
    rank = jnp.cumsum(takers) - 1
    shares = total // count + (rank < total % count)
    return jnp.where(takers, shares, 0).astype(jnp.int32)
