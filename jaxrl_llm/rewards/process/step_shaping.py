"""Rewards of steps, bounded or shaped so that more steps are not more reward."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, Share, ranged

Delta = Literal["none", "drop", "keep"]


@ranged
def clipped_delta(
    turn_rewards: Float[Array, "B S"],
    turns: Int[Array, "B"],
    *,
    threshold: float | None = 0.5,
    delta: Delta = "drop",
    coefficient: NonNegative = 1.0,
) -> Float[Array, "B S"]:
    """Scores of steps whose sum does not grow with the number of steps.

        clip    x_s = min(r_s - threshold, 0)
        delta   d_s = x_s - x_{s+1}
        drop    d of the last step is 0 and that of the last but one x_s: success speaks for the last
        keep    d of the last step is x_s

    Raw sums of a process reward model pay for repeated filler. Add the reward of success at the end.

    Args:
      turn_rewards: r in [0, 1], the score of each step; NaN does not apply and counts as 0 after clipping.
      turns: steps of each row; those behind get 0.
      threshold: as a quantile or mean of the model's scores; None leaves the clipping out.
      delta: how differences end; "none" takes no differences.
      coefficient: factor of the result, 0.02 to 1.

    Returns:
      One reward a step, float32.

    Raises:
      ValueError: for an unknown delta.

    Reference: Clip and Delta (2410.15115).
    Certainty: recalled
    """
    chex.assert_rank([turn_rewards, turns], [2, 1])
    if delta not in get_args(Delta):
        raise ValueError(f"delta is {delta!r}; it must be one of {', '.join(get_args(Delta))}")
    place = jnp.arange(turn_rewards.shape[1])[None, :]
    r = turn_rewards.astype(jnp.float32)
    x = r if threshold is None else jnp.minimum(r - threshold, 0.0)
    x = jnp.where((place < turns[:, None]) & ~jnp.isnan(x), x, 0.0)
    if delta == "none":
        return coefficient * x
    last = place == turns[:, None] - 1
    following = jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)
    if delta == "drop":
        x, following = jnp.where(last, 0.0, x), jnp.where(place == turns[:, None] - 2, 0.0, following)
    return coefficient * jnp.where(last, x, x - following)


@ranged
def potential_shaped(
    turn_rewards: Float[Array, "B S"],
    potentials: Float[Array, "B S+1"],
    turns: Int[Array, "B"],
    *,
    gamma: Share = 1.0,
) -> Float[Array, "B S"]:
    """Rewards of turns plus the discounted gain of a potential, which leaves the ranking of policies as it is.

        r_s <- r_s + gamma * phi_{s+1} - phi_s,   phi = 0 where the episode ends

    The discounted sum changes by -phi_0, the same for all that a policy may do.

    Args:
      turn_rewards: reward of each turn.
      potentials: phi of the state in front of each turn, and of the one behind the last; NaN counts as 0.
      turns: turns of each row; those behind keep 0.
      gamma: discount of the return that the rewards are for.

    Returns:
      One reward a turn, float32.

    Raises:
      ValueError: if there is not one potential more than turns.

    Reference: potential-based shaping, Ng, Harada and Russell (1999).
    Certainty: recalled
    """
    chex.assert_rank([turn_rewards, potentials, turns], [2, 2, 1])
    if potentials.shape[1] != turn_rewards.shape[1] + 1:
        raise ValueError(
            f"potentials has {potentials.shape[1]} columns for {turn_rewards.shape[1]} turns; give one for the state "
            "in front of each turn and one for the state behind the last"
        )
    place = jnp.arange(potentials.shape[1])[None, :]
    phi = jnp.where((place < turns[:, None]) & ~jnp.isnan(potentials), potentials.astype(jnp.float32), 0.0)
    shaped = turn_rewards.astype(jnp.float32) + gamma * phi[:, 1:] - phi[:, :-1]
    return jnp.where(place[:, :-1] < turns[:, None], shaped, 0.0)
