"""Advantages of the turns of a conversation."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages.group_relative.group_baselines import leave_one_out
from jaxrl_llm.advantages.value_based.gae import generalized_advantages
from jaxrl_llm.ranges import NonNegative, Share, ranged
from jaxrl_llm.statistics import group_mean, group_std

Scope = Literal["group", "batch"]


def taken_turns(turn: Int[Array, "B T"], mask: Float[Array, "B T"], turns: int) -> Bool[Array, "B S"]:
    """Whether a row has a token that counts in each of its first `turns` turns."""
    count = jax.vmap(lambda row, where: jax.ops.segment_sum(where, row, num_segments=turns))
    return count(turn.astype(jnp.int32), (mask > 0).astype(jnp.float32)) > 0


def turn_leave_one_out(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
) -> Float[Array, "B T"]:
    """Each turn's own reward minus the mean of the other samples' at the same turn; no credit crosses turns.

        A_{i,s} = r_{i,s} - mean_{j != i} r_{j,s}

    over the samples j of the group that took turn s; 0 where there is no other.

    Args:
      turn_rewards: reward of each turn.
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count; a turn without such tokens is absent.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One advantage per token, the same on all tokens of a turn; 0 outside the mask and in absent rows.

    Reference: SCoRe (2409.12917).
    Certainty: verified
    """
    chex.assert_rank([turn_rewards, turn, mask, group, weight], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([turn, mask])
    turns = turn_rewards.shape[1]
    taken = taken_turns(turn, mask, turns) & (weight > 0)[:, None]
    counts = jnp.where(taken, weight.astype(jnp.float32)[:, None], 0.0)
    advantages = jax.vmap(leave_one_out, in_axes=(1, None, 1), out_axes=1)(turn_rewards, group, counts)
    return on_tokens(advantages, turn, mask, weight)


@ranged
def turn_mixed_normalized(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    alpha: Share = 0.5,
    gamma: Share = 1.0,
    scope: Scope = "group",
    eps: NonNegative = 1e-8,
) -> Float[Array, "B T"]:
    """Returns compared at the same turn, mixed with the turn's own reward compared over all turns.

        R_s = r_s + gamma * R_{s+1}
        A_s = alpha * z(R_s over the samples of the group at turn s) + (1 - alpha) * z(r_s over all turns in scope)

    with z(x) = (x - mean) / (population std + eps). A turn reached by only one sample has first part 0. With one turn
    and alpha = 1 it is GRPO with the population's deviation.

    The paper's text was not at hand. Its first version normalises the second part over the batch, a later one (MICA)
    over the group: `scope`. The equal mixture and gamma = 1 are our choices.

    Args:
      turn_rewards: r, the reward of each turn, such as the drop of a judged distance to the goal.
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count; a turn without such tokens is absent.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      alpha: share of the comparison of returns, in [0, 1].
      gamma: discount per turn.
      scope: turns that a turn's own reward is compared with.
      eps: added to the deviations, in units of reward.

    Returns:
      One advantage per token, the same on all tokens of a turn; 0 outside the mask and in absent rows.

    Raises:
      ValueError: for an unknown scope, or alpha or gamma outside [0, 1].

    Reference: MAPO (2603.06194).
    Certainty: reconstructed
    """
    chex.assert_rank([turn_rewards, turn, mask, group, weight], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([turn, mask])
    if scope not in get_args(Scope):
        raise ValueError(f"scope is {scope!r}; it must be one of {', '.join(get_args(Scope))}")
    rows, turns = turn_rewards.shape
    taken = taken_turns(turn, mask, turns) & (weight > 0)[:, None]
    rewards = jnp.where(taken, turn_rewards.astype(jnp.float32), 0.0)
    returns, _ = generalized_advantages(rewards, jnp.zeros_like(rewards), taken, gamma=gamma, lam=1.0)
    counts = jnp.where(taken, weight.astype(jnp.float32)[:, None], 0.0).ravel()

    def z(values, ids):
        values, ids = values.ravel(), ids.astype(jnp.int32).ravel()
        centred = values - group_mean(values, ids, counts)
        return (centred / (group_std(values, ids, counts, ddof=0) + eps)).reshape(rows, turns)

    same_turn = group[:, None] * turns + jnp.arange(turns)
    together = jnp.broadcast_to(group[:, None] if scope == "group" else jnp.zeros((1, 1), jnp.int32), (rows, turns))
    mixed = jnp.where(taken, alpha * z(returns, same_turn) + (1 - alpha) * z(rewards, together), 0.0)
    return on_tokens(mixed, turn, mask, weight)


@ranged
def outcome_and_turn_centred(
    turn_rewards: Float[Array, "B S"],
    correct: Float[Array, "B"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    gamma: Share = 0.9,
    beta: NonNegative = 1.0,
) -> Float[Array, "B T"]:
    """The outcome, discounted by the number of turns, plus the turn's reward, each minus its mean over the group.

        A_{i,s} = o_i * gamma^{n_i} - mean_j o_j * gamma^{n_j} + beta * (r_{i,s} - mean_{j,k} r_{j,k})

    with n_i the turns of row i, and the last mean over all turns of the group. Neither part is divided by a deviation.

    Args:
      turn_rewards: r of each turn, as of `weighted_tests`.
      correct: o, 1 for a won episode.
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count; a turn without such tokens is absent.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      gamma: discount of the outcome per turn; our choice.
      beta: weight of the turns' part; our choice.

    Returns:
      One advantage per token, the same on all tokens of a turn; 0 outside the mask and in absent rows.

    Reference: VeRPO (2601.03525).
    Certainty: recalled
    """
    chex.assert_rank([turn_rewards, correct, turn, mask, group, weight], [2, 1, 2, 2, 1, 1])
    chex.assert_equal_shape([turn, mask])
    there, taken = weight.astype(jnp.float32), taken_turns(turn, mask, turn_rewards.shape[1])
    rewards, count = jnp.where(taken, turn_rewards.astype(jnp.float32), 0.0), taken.sum(axis=1).astype(jnp.float32)
    mean = group_mean(rewards.sum(axis=1) / jnp.maximum(count, 1.0), group, there * count)
    outcome = correct.astype(jnp.float32) * gamma**count
    each = (outcome - group_mean(outcome, group, there))[:, None] + beta * (rewards - mean[:, None])
    return on_tokens(each, turn, mask, weight)


def on_tokens(
    per_turn: Float[Array, "B S"], turn: Int[Array, "B T"], mask: Float[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, "B T"]:
    """The number of each turn on its tokens; 0 outside the mask, in absent rows and for turns >= S."""
    turns = per_turn.shape[1]
    inside = (mask > 0) & (turn >= 0) & (turn < turns)
    per_token = jnp.take_along_axis(per_turn, jnp.clip(turn, 0, turns - 1).astype(jnp.int32), axis=1)
    return jnp.where(inside & (weight > 0)[:, None], per_token, 0.0)
