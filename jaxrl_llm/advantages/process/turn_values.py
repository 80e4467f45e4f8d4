"""Generalised advantages whose steps are turns, and the running stock of a conversation."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.process.turn_credit import on_tokens
from jaxrl_llm.advantages.value_based.gae import generalized_advantages
from jaxrl_llm.ranges import PositiveShare, Share, ranged
from jaxrl_llm.statistics import at_turns, token_weights


@ranged
def turn_advantages(
    turn_rewards: Float[Array, "B S"],
    old_values: Float[Array, "B T"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    gamma: Share = 1.0,
    lam: Share = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimates over turns: discount and lambda count turns, whatever tokens they have.

        A_s = r_s + gamma * V_{s+1} - V_s + gamma * lam * A_{s+1},   R_s = A_s + V_s

    over the turns that were taken, with V_s the value model's output at the first token of turn s. `"[advantages,
    returns]": turn_advantages` fills both.

    Args:
      turn_rewards: reward of each turn.
      old_values: value model at each token, before the update.
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count; a turn without such tokens is absent.
      weight: weight of each row; 0 is absent.
      gamma: discount per turn.
      lam: weight of longer returns.

    Returns:
      (advantages, returns), the same on all tokens of a turn; 0 outside the mask and in absent rows.

    Reference: GAE (1506.02438), SPA-RL (2505.20732).
    Certainty: verified
    """
    chex.assert_rank([turn_rewards, old_values, turn, mask, weight], [2, 2, 2, 2, 1])
    values, taken = at_turns(old_values, turn, token_weights(mask, weight), turn_rewards.shape[1], end=False)
    rewards = jnp.where(taken, turn_rewards.astype(jnp.float32), 0.0)
    found = generalized_advantages(rewards, values, taken.astype(jnp.float32), gamma=gamma, lam=lam)
    advantages, returns = (on_tokens(each, turn, mask, weight) for each in found)
    return advantages, returns


@ranged
def running_stock(
    turn_rewards: Float[Array, "B S"], *, start: float = 0.0, gamma: PositiveShare = 1.0
) -> Float[Array, "B S+1"]:
    """The stock before each turn and after the last: the return still needed, or already collected.

        C_0 = start,   C_{s+1} = (C_s + r_s) / gamma

    so that gamma^S C_S = start + the discounted return: a utility of the return is one of the last state, and a policy
    that sees the stock can be best under any. For the conditional value at risk start at minus the value at risk and
    take min(C_S, 0); for a set point -|C_S|.

    Args:
      turn_rewards: reward of each turn, 0 for those that were not taken.
      start: C_0.
      gamma: discount per turn.

    Returns:
      One stock more than turns, float32.

    Reference: distributional dynamic programming (2501.13028).
    Certainty: recalled
    """
    chex.assert_rank(turn_rewards, 2)

    def forward(stock, reward):
        following = (stock + reward) / gamma
        return following, following

    first = jnp.full(turn_rewards.shape[:1], start, jnp.float32)
    _, after = jax.lax.scan(forward, first, turn_rewards.astype(jnp.float32).T)
    return jnp.concatenate([first[:, None], after.T], axis=1)
