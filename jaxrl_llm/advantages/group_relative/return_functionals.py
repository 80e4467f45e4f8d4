"""Advantages for functionals of a prompt's returns other than the mean."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, Positive, PositiveShare, ranged
from jaxrl_llm.statistics import group_max, group_mean, group_rank, group_size, group_sum, present

Functional = Literal["mean", "lower_tail", "upper_tail", "exponential", "mean_variance", "set_point"]


@ranged
def return_functional(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    functional: Functional = "lower_tail",
    share: PositiveShare = 0.25,
    beta: Positive = 1.0,
    lam: NonNegative = 0.5,
    target: float = 0.0,
) -> Float[Array, "B"]:
    """What each sample adds to a functional of its group's returns, minus the mean over the group.

        mean            u = r
        lower_tail      u = min(r - q, 0) / share
        upper_tail      u = max(r - Q, 0) / share
        exponential     u = exp(beta * r) / (beta * e)
        mean_variance   u = r - lam * (r - m)^2
        set_point       u = -|r - target|

    and then A = u - mean u, over the n samples of a group: q is the return at place ceil(share * n) from below, Q that
    from above, e the mean of exp(beta * r) and m that of r.

    lower_tail raises the conditional value at risk: the policy becomes risk-averse. With share * n <= 1 the tail is one
    return and every u is 0: take n >= 2 / share samples.

    Args:
      rewards: r.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      functional: as above.
      share: of the tails.
      beta: of the exponential.
      lam: price of the variance.
      target: the set point.

    Returns:
      One advantage per row, float32, 0 in absent rows.

    Raises:
      ValueError: for an unknown functional.

    Reference: distributional dynamic programming (2501.13028).
    Certainty: recalled
    """
    chex.assert_rank([rewards, group, weight], 1)
    if functional not in get_args(Functional):
        raise ValueError(f"functional is {functional!r}; it must be one of {', '.join(get_args(Functional))}")
    r = present(rewards, weight)
    match functional:
        case "mean":
            u = r
        case "lower_tail":
            u = _below(r, group, weight, share)
        case "upper_tail":
            u = -_below(-r, group, weight, share)
        case "exponential":
            grown = jnp.exp(beta * (r - group_max(r, group, weight)))
            mean = group_mean(grown, group, weight)
            u = grown / (beta * jnp.where(mean > 0, mean, 1.0))
        case "mean_variance":
            u = r - lam * jnp.square(r - group_mean(r, group, weight))
        case "set_point":
            u = -jnp.abs(r - target)
    return present(u - group_mean(u, group, weight), weight)


def _below(r, group, weight, share):
    there = (weight > 0).astype(jnp.float32)
    # A product such as 0.2 * 5 may lie a hair above its integer.
    place = jnp.ceil(share * group_size(group, weight) - 1e-5).astype(jnp.int32) - 1
    at = group_rank(r, group, weight) == jnp.maximum(place, 0)
    return jnp.minimum(r - group_sum(jnp.where(at, r, 0.0), group, there), 0.0) / share
