"""Advantages of the steps of a completion, or of the turns of a conversation, from their rewards.

`turn` numbers steps and turns alike: an environment fills it, or a reading of borders (`rewards.step_borders`).
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages.group_relative.group_baselines import group_normalized
from jaxrl_llm.advantages.process.turn_credit import on_tokens, taken_turns
from jaxrl_llm.advantages.value_based.gae import generalized_advantages
from jaxrl_llm.ranges import NonNegative, Positive, Share, ranged
from jaxrl_llm.statistics import group_mean, group_std, group_sum

Baseline = Literal["token", "step", "none"]
Gain = Literal["probability", "log_probability"]


def min_form_returns(
    turn_rewards: Float[Array, "B S"], turn: Int[Array, "B T"], mask: Float[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, "B T"]:
    """The minimum of the rewards from each step on, in place of their sum: overrated filler steps add nothing.

        G_k = min_{j >= k} r_j

    Args:
      turn_rewards: reward of each step.
      turn: number of the step of each token.
      mask: non-zero on tokens that count; a step without such tokens is absent.
      weight: weight of each row; 0 is absent.

    Returns:
      One return per token, the same on all tokens of a step.

    Reference: PURE (2504.15275).
    Certainty: verified
    """
    chex.assert_rank([turn_rewards, turn, mask, weight], [2, 2, 2, 1])
    taken = taken_turns(turn, mask, turn_rewards.shape[1])
    rewards = jnp.where(taken, turn_rewards.astype(jnp.float32), jnp.inf)
    return on_tokens(jnp.where(taken, jax.lax.cummin(rewards, axis=1, reverse=True), 0.0), turn, mask, weight)


def min_form_rewards(
    turn_rewards: Float[Array, "B S"], taken: Bool[Array, "B S"], *, temperature: float = 0.1
) -> Float[Array, "B S"]:
    """Rewards of steps whose sum is close to their minimum: softmax(-r / temperature)_k r_k over the steps taken."""
    rewards = jnp.where(taken, turn_rewards.astype(jnp.float32), 0.0)
    share = jax.nn.softmax(jnp.where(taken, -rewards / temperature, -jnp.inf), axis=1)
    return jnp.where(taken, share * rewards, 0.0)


@ranged
def min_form_advantages(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    correct: Float[Array, "B"] | None = None,
    *,
    temperature: Positive = 0.1,
    baseline: Baseline = "token",
    verifier_coefficient: NonNegative = 1.0,
) -> Float[Array, "B T"]:
    """PURE: advantages from step rewards in the min form, with a leave-one-out baseline and a verifier at the end.

        p_k = r_k exp(-r_k / temperature) / sum_j exp(-r_j / temperature)
        o_i = sum_k p_k

    The baseline uses the other rows of the group:

        token   p_k - tokens_k (sum_{j != i} o_j) / (sum_{j != i} length_j)
        step    p_k - mean_{j != i} o_j / steps_j

    The result is placed on the last token of each step, and c (v_i - mean_{j != i} v_j) with v_i = correct_i - 1 on the
    last token of the row. The advantage of a token is the sum from that token to the end.

    Args:
      turn_rewards: score of each step, in [-1, 1].
      turn: number of the step of each token.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      correct: the verifier's verdict; without it, or with coefficient 0, only step rewards are used.
      temperature: of the softmax.
      baseline: as above, or none.
      verifier_coefficient: c.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows. A row that is alone in its group has no baseline.

    Raises:
      ValueError: for an unknown baseline.

    Reference: PURE (2504.15275).
    Certainty: verified
    """
    chex.assert_rank([turn_rewards, turn, mask, group, weight], [2, 2, 2, 1, 1])
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline is {baseline!r}; it must be one of {', '.join(get_args(Baseline))}")
    turns = turn_rewards.shape[1]
    there = (weight > 0).astype(jnp.float32)
    counted = (mask > 0) & (weight > 0)[:, None]
    taken = taken_turns(turn, counted.astype(jnp.float32), turns)
    shaped = min_form_rewards(turn_rewards, taken, temperature=temperature)
    outcome, steps = shaped.sum(1), jnp.maximum(taken.sum(1), 1)
    inside = counted & (turn >= 0) & (turn < turns)
    count = jax.vmap(lambda n, w: jax.ops.segment_sum(w, n, num_segments=turns))
    tokens = count(jnp.clip(turn, 0, turns - 1).astype(jnp.int32), inside.astype(jnp.float32))
    if baseline == "token":
        length = counted.sum(1).astype(jnp.float32)
        rest = jnp.maximum(_others(length, group, there), 1.0)
        shaped = shaped - tokens * (_others(outcome, group, there) / rest)[:, None]
    elif baseline == "step":
        others = jnp.maximum(_others(there, group, there), 1.0)
        shaped = shaped - jnp.where(taken, (_others(outcome / steps, group, there) / others)[:, None], 0.0)
    to_go = jnp.cumsum(shaped[:, ::-1], axis=1)[:, ::-1]
    advantages = on_tokens(jnp.where(taken, to_go, 0.0), turn, mask, weight)
    if correct is None or verifier_coefficient == 0:
        return advantages
    verdict = (correct.astype(jnp.float32) - 1.0) * there
    others = _others(there, group, there)
    mean = jnp.where(others > 0, _others(verdict, group, there) / jnp.maximum(others, 1.0), 0.0)
    return jnp.where(counted, advantages + verifier_coefficient * (verdict - mean)[:, None], 0.0)


def _others(values: Array, group: Array, there: Array) -> Array:
    return group_sum(values, group, there) - jnp.where(there > 0, values, 0.0)


@ranged
def merged_transitions(
    advantages: Float[Array, "B"],
    state_id: Int[Array, "B S"],
    action_id: Int[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
) -> Float[Array, "B T"]:
    """SALT: a transition that several trajectories of a group share has the mean of their advantages.

        A_e = mean of the trajectory advantages over all occurrences of e = (state, action, next state) in the group

    A transition that occurs once keeps its trajectory's advantage. The sum over all steps is unchanged; transitions
    that successes and failures share get about 0, those where they part keep their sign.

    Args:
      advantages: of the trajectories (`group_normalized`, `leave_one_out`).
      state_id: number of the state at the start of each turn: equal where states are equal.
      action_id: number of the action of each turn.
      turn: number of the turn of each token.
      mask: non-zero on tokens that count; a turn without such tokens is absent.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One advantage per token, the same on all tokens of a turn. The state after a row's last turn equals no other.

    Reference: SALT (2510.20022).
    Certainty: recalled
    """
    chex.assert_rank([advantages, state_id, action_id, turn, mask, group, weight], [1, 2, 2, 2, 2, 1, 1])
    rows, turns = state_id.shape
    taken = taken_turns(turn, mask, turns) & (weight > 0)[:, None]
    following = jnp.concatenate([state_id[:, 1:], jnp.full((rows, 1), -1, state_id.dtype)], axis=1)
    last = ~jnp.concatenate([taken[:, 1:], jnp.zeros((rows, 1), bool)], axis=1)
    own = -1 - jnp.arange(rows, dtype=state_id.dtype)[:, None]
    following = jnp.where(last & (following < 0), own, following)
    keys = jnp.stack([jnp.broadcast_to(group[:, None], (rows, turns)), state_id, action_id, following], -1).reshape(
        -1, 4
    )
    there = taken.ravel()
    same = (keys[:, None] == keys[None]).all(-1) & there[None]
    values = jnp.broadcast_to(advantages[:, None], (rows, turns)).ravel()
    mean = jnp.where(same, jnp.where(there, values, 0.0)[None], 0.0).sum(1) / jnp.maximum(same.sum(1), 1)
    return on_tokens(jnp.where(there, mean, 0.0).reshape(rows, turns), turn, mask, weight)


@ranged
def judged_thoughts(
    correct: Float[Array, "B"],
    turn_labels: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    alpha: NonNegative = 1.0,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B T"]:
    """Advantages of thoughts that a judge labels right or wrong, inside solutions that are right or wrong.

        right solution   right thought z_i;  wrong thought z_i - alpha * acc
        wrong solution   wrong thought z_i;  right thought 0

    with z = (o - mean) / (std + eps) of the outcomes o = +1 or -1 of the group and acc the share of right solutions. As
    accuracy rises the penalty of wrong thoughts in right solutions grows.

    Args:
      correct: 1 where the solution is right.
      turn_labels: 1 where the judge finds the step right.
      turn: number of the step of each token.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      alpha: of the penalty.
      eps: added to the deviation.

    Returns:
      One advantage per token.

    Reference: thought-level process reward (2507.23317).
    Certainty: reconstructed
    """
    chex.assert_rank([correct, turn_labels, turn, mask, group, weight], [1, 2, 2, 2, 1, 1])
    right = correct > 0
    z = group_normalized(jnp.where(right, 1.0, -1.0), group, weight, eps=eps)
    accuracy = group_mean(right.astype(jnp.float32), group, weight)
    fine = turn_labels > 0
    inside = jnp.where(fine, z[:, None], (z - alpha * accuracy)[:, None])
    value = jnp.where(right[:, None], inside, jnp.where(fine, 0.0, z[:, None]))
    return on_tokens(value, turn, mask, weight)


@ranged
def information_gain(
    turn_answer_logprobs: Float[Array, "B S+1"],
    rewards: Float[Array, "B"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    gain: Gain = "probability",
    gamma: Share = 1.0,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B T"]:
    """IGPO: each turn's reward is its gain in the reference answer's likelihood, the last turn's the outcome.

        g_s = e_{s+1} - e_s  for every turn but the last,   e = exp(L) (or L)
        A_s = sum_{k >= s} gamma^(k - s) z_k

    z standardises the gains of the group together, and the outcomes of the group apart (unbiased deviation + eps).

    Args:
      turn_answer_logprobs: L, mean log-probability of the reference answer after 0 to S turns.
      rewards: outcome of each row.
      turn: number of the turn of each token.
      mask: non-zero on tokens that count; a turn without such tokens is absent.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      gain: in probabilities, or in log-probabilities.
      gamma: discount per turn.
      eps: added to the deviations.

    Returns:
      One advantage per token, the same on all tokens of a turn.

    Raises:
      ValueError: for an unknown form of the gain.

    Reference: IGPO (2510.14967).
    Certainty: verified
    """
    chex.assert_rank([turn_answer_logprobs, rewards, turn, mask, group, weight], [2, 1, 2, 2, 1, 1])
    if gain not in get_args(Gain):
        raise ValueError(f"gain is {gain!r}; it must be one of {', '.join(get_args(Gain))}")
    rows, turns = turn_answer_logprobs.shape[0], turn_answer_logprobs.shape[1] - 1
    taken = taken_turns(turn, mask, turns) & (weight > 0)[:, None]
    last = taken & ~jnp.concatenate([taken[:, 1:], jnp.zeros((rows, 1), bool)], axis=1)
    said = turn_answer_logprobs.astype(jnp.float32)
    said = jnp.exp(said) if gain == "probability" else said
    gains = jnp.where(taken & ~last, said[:, 1:] - said[:, :-1], 0.0)
    counts = (taken & ~last).astype(jnp.float32).ravel()
    groups = jnp.repeat(group, turns)
    centred = gains.ravel() - group_mean(gains.ravel(), groups, counts)
    z = (centred / (group_std(gains.ravel(), groups, counts) + eps)).reshape(rows, turns)
    outcome = group_normalized(rewards, group, weight, eps=eps)
    z = jnp.where(last, outcome[:, None], jnp.where(taken, z, 0.0))

    to_go, _ = generalized_advantages(z, jnp.zeros_like(z), taken, gamma=gamma, lam=1.0)
    return on_tokens(to_go, turn, mask, weight)
