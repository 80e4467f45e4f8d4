"""Step rewards, bounded or shaped so that more steps do not give more reward."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import NonNegative, Share, ranged
from jaxrl_llm.rewards.process.turn_rewards import tokens_per_turn

Delta = Literal["none", "drop", "keep"]


@ranged
def clipped_delta(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    rewards: Float[Array, "B"] | None = None,
    *,
    threshold: float | None = 0.5,
    delta: Delta = "drop",
    coefficient: NonNegative = 1.0,
) -> Float[Array, "B S"]:
    """Step scores whose sum does not grow with the number of steps, plus the outcome at the last step.

        clip    x_s = min(r_s - threshold, 0)
        delta   d_s = x_s - x_{s+1}
        drop    d of the last step is 0 and that of the last but one x_s: the outcome covers the last step
        keep    d of the last step is x_s

    Raw sums of a process reward model reward repeated filler steps.

    Args:
      turn_rewards: r in [0, 1], the score of each step; NaN does not apply and counts as 0 after clipping.
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count; the last step with one ends the row.
      rewards: the outcome, added to the last step; NaN adds nothing.
      threshold: such as a quantile or mean of the model's scores; None is no clipping.
      delta: form of the last difference; "none" takes no differences.
      coefficient: factor of the step rewards, 0.02 to 1.

    Returns:
      One reward per step, float32; 0 for steps that were not taken.

    Raises:
      ValueError: for an unknown delta.

    Reference: Clip and Delta (2410.15115).
    Certainty: recalled
    """
    chex.assert_rank([turn_rewards, turn, mask], 2)
    if delta not in get_args(Delta):
        raise ValueError(f"delta is {delta!r}; it must be one of {', '.join(get_args(Delta))}")
    r = turn_rewards.astype(jnp.float32)
    x = r if threshold is None else jnp.minimum(r - threshold, 0.0)
    taken, last = _steps(turn, mask, r.shape[1])
    x = jnp.where(taken & ~jnp.isnan(x), x, 0.0)
    x = jnp.where(last, 0.0, x) if delta == "drop" else x
    following = jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)
    shaped = coefficient * (x if delta == "none" else x - following)
    return shaped if rewards is None else shaped + jnp.where(last, jnp.nan_to_num(rewards)[:, None], 0.0)


@ranged
def potential_shaped(
    potentials: Float[Array, "B S+1"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    rewards: Float[Array, "B"],
    turn_rewards: Float[Array, "B S"] | None = None,
    *,
    gamma: Share = 1.0,
) -> Float[Array, "B S"]:
    """Turn rewards plus the discounted gain of a potential, which preserves the ranking of policies.

        r_s <- r_s + gamma * phi_{s+1} - phi_s,   phi = 0 where the episode ends

    The discounted sum changes by -phi_0, which does not depend on the policy's actions.

    Args:
      potentials: phi of the state before each turn, and of the one after the last; NaN counts as 0.
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count; the last turn with one ends the episode.
      rewards: total reward of each row, given at its last turn where there are no `turn_rewards`.
      turn_rewards: reward of each turn; they take the place of `rewards`.
      gamma: discount of the return.

    Returns:
      One reward per turn, float32; 0 for turns that were not taken.

    Raises:
      ValueError: unless the number of potentials is that of turns plus 1.

    Reference: potential-based shaping, Ng, Harada and Russell (1999).
    Certainty: recalled
    """
    chex.assert_rank([potentials, turn, mask, rewards], [2, 2, 2, 1])
    turns = potentials.shape[1] - 1
    if turn_rewards is not None and turn_rewards.shape[1] != turns:
        raise ValueError(
            f"potentials has {turns + 1} columns for {turn_rewards.shape[1]} turns; give one for the state before each "
            "turn and one for the state after the last"
        )
    taken, last = _steps(turn, mask, turns)
    r = jnp.where(last, rewards[:, None], 0.0) if turn_rewards is None else turn_rewards
    phi = jnp.nan_to_num(potentials.astype(jnp.float32))
    gain = gamma * jnp.where(last, 0.0, phi[:, 1:]) - phi[:, :-1]
    return jnp.where(taken, r.astype(jnp.float32) + gain, 0.0)


@ranged
def accumulated_potentials(turn_rewards: Float[Array, "B S"], *, scale: NonNegative = 1.0) -> Float[Array, "B S+1"]:
    """The sum of earlier turn rewards as the potential of a state.

        phi_s = scale * sum_{k < s} r_k

    Args:
      turn_rewards: r, reward of each turn, such as `reference_progress`.
      scale: factor of the potential.

    Returns:
      One potential for the state before each turn, and one for the state after the last.
    """
    total = jnp.cumsum(turn_rewards.astype(jnp.float32), axis=1)
    return scale * jnp.concatenate([jnp.zeros_like(total[:, :1]), total], axis=1)


def _steps(
    turn: Int[Array, "B T"], mask: Float[Array, "B T"], steps: int
) -> tuple[Bool[Array, "B S"], Bool[Array, "B S"]]:
    """(mask of steps up to the last with a token that counts, mask of that last step)."""
    place = jnp.arange(steps)[None, :]
    counted = tokens_per_turn(mask > 0, turn, steps) > 0
    last = jnp.max(jnp.where(counted, place, -1), axis=1, keepdims=True, initial=-1)
    return place <= last, place == last
