"""Turns of a completion and their rewards: borders, progress along a reference, sums, shaping, placement on tokens."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Count, Natural, NonNegative, Positive, ranged

Density = Literal["dense", "single"]
Stage = Literal["first", "second"]

# `;` of `jaxrl_llm.data.CharacterTokenizer`, which ends a step of a scratchpad; a test checks that both agree.
SEPARATOR_ID = 87


@ranged
def separated_turns(
    tokens: Int[Array, "B T"], length: Int[Array, "B"], *, separator_id: Natural = SEPARATOR_ID
) -> Int[Array, "B T"]:
    """The turn of each token: the number of separators before it. A separator belongs to the turn that it ends.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      separator_id: id of the token that ends a turn; by default the one that ends a step of a scratchpad.

    Returns:
      One index per token, from 0; padding continues the last turn.

    >>> separated_turns(jnp.array([[20, 87, 21, 22, 87]]), jnp.array([5])).tolist()
    [[0, 0, 1, 1, 1]]
    """
    chex.assert_rank([tokens, length], [2, 1])
    chex.assert_equal_shape_prefix([tokens, length], 1)
    ends = ((tokens == separator_id) & _inside(tokens, length)).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


@ranged
def reference_progress(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    turn: Int[Array, "B T"],
    demonstration_tokens: Int[Array, "B T"],
    demonstration_length: Int[Array, "B"],
    *,
    max_turns: Count,
    separator_id: Natural = SEPARATOR_ID,
) -> Float[Array, "B S"]:
    """1 for each turn whose tokens are those of the reference's turn, else 0.

        r_s = [ tokens of turn s == reference's tokens of turn s ]

    This is the decrease of the number of reference turns not yet reproduced.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      turn: index of the turn of each token (`separated_turns`).
      demonstration_tokens: reference completion, right-padded.
      demonstration_length: tokens in each reference completion.
      max_turns: turns that are rewarded, S; later turns have no reward.
      separator_id: id of the token that ends a turn of the reference.

    Returns:
      One reward per turn; 0 for turns that either of the two lacks.

    Raises:
      ValueError: for no turns.
    """
    chex.assert_rank([tokens, length, turn, demonstration_tokens, demonstration_length], [2, 1, 2, 2, 1])
    chex.assert_equal_shape([tokens, turn])
    if 0 in (tokens.shape[1], demonstration_tokens.shape[1]):
        return jnp.zeros((tokens.shape[0], max_turns), jnp.float32)
    reference_turn = separated_turns(demonstration_tokens, demonstration_length, separator_id=separator_id)
    inside = _inside(tokens, length)
    size = tokens_per_turn(inside, turn, max_turns)
    reference_size = tokens_per_turn(_inside(demonstration_tokens, demonstration_length), reference_turn, max_turns)
    first, reference_first = (jnp.cumsum(count, axis=1) - count for count in (size, reference_size))
    # Compare each token with the reference's token at the same position of the same turn.
    shift = jnp.take_along_axis(reference_first - first, jnp.clip(turn, 0, max_turns - 1), axis=1)
    position = jnp.arange(tokens.shape[1])[None, :] + shift
    at = jnp.clip(position, 0, demonstration_tokens.shape[1] - 1)
    same = jnp.take_along_axis(demonstration_tokens, at, axis=1) == tokens
    equal = tokens_per_turn(inside & same, turn, max_turns) == size
    return (equal & (size == reference_size) & (size > 0)).astype(jnp.float32)


@ranged
def episode_reward(turn_rewards: Float[Array, "B S"], *, turn: int | None = None) -> Float[Array, "B"]:
    """The sum of a conversation's turn rewards, or the reward of one turn.

        r = sum_s r_s

    Args:
      turn_rewards: reward of each turn, 0 for those that were not taken.
      turn: index of a single turn to use, from 0; negative indices count from the largest possible turn.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for a turn out of range.
    """
    chex.assert_rank(turn_rewards, 2)
    turns = turn_rewards.shape[1]
    if turn is None:
        return turn_rewards.astype(jnp.float32).sum(axis=1)
    if not -turns <= turn < turns:
        raise ValueError(f"turn is {turn}, but episodes have up to {turns} turns; use a number from 0 to {turns - 1}")
    return turn_rewards[:, turn].astype(jnp.float32)


def turn_count(turns: Int[Array, "B"]) -> Float[Array, "B"]:
    """The number of turns, as a weighted reward: a cost of tool calls, or a bonus that can be farmed.

    Args:
      turns: turns that were taken.

    Returns:
      One number per row, float32.
    """
    return turns.astype(jnp.float32)


@ranged
def normalized_turn_rewards(
    turn_rewards: Float[Array, "B S"], correct: Float[Array, "B"], *, attainable: Positive
) -> Float[Array, "B S"]:
    """Turn scores on one scale: divided by the number of scored turns in won episodes, else by the attainable total.

        r_s = s_s / #{k : s_k != 0} where the episode is won, else s_s / attainable

    Args:
      turn_rewards: s, the score of each turn, 0 for those that were not taken.
      correct: 1 for an episode that is won.
      attainable: total of the scores that an episode can reach.

    Returns:
      One reward per turn, float32.

    Raises:
      ValueError: if attainable is not positive.

    Reference: Meow-Tea-Taro (2510.01132).
    Certainty: verified
    """
    chex.assert_rank([turn_rewards, correct], [2, 1])
    chex.assert_equal_shape_prefix([turn_rewards, correct], 1)
    scores = turn_rewards.astype(jnp.float32)
    scored = jnp.maximum((scores != 0).sum(axis=1, keepdims=True), 1)
    return scores / jnp.where((correct > 0)[:, None], scored, attainable)


def turn_end_rewards(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    density: Density = "dense",
) -> Float[Array, "B T"]:
    """Token rewards: each turn's reward on the last token of the turn that counts.

        rho_t = r_s where t is the last token of turn s, else 0

    or, with a single reward, sum_s r_s at the last token of the last turn.

    Args:
      turn_rewards: reward of each turn.
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count, 0 on observations.
      density: 'dense' for each turn, 'single' for the sum at the end.

    Returns:
      One reward per token, 0 elsewhere. The reward of a turn without a token that counts is dropped (dense).

    Raises:
      ValueError: for an unknown density.

    >>> turn = jnp.array([[0, 0, 0, 1, 1, 1]])
    >>> turn_end_rewards(jnp.array([[0.25, 0.5]]), turn, jnp.array([[1, 1, 0, 1, 1, 0]])).tolist()
    [[0.0, 0.25, 0.0, 0.0, 0.5, 0.0]]

    Reference: Meow-Tea-Taro (2510.01132).
    Certainty: verified
    """
    chex.assert_rank([turn_rewards, turn, mask], 2)
    chex.assert_equal_shape([turn, mask])
    if density not in get_args(Density):
        raise ValueError(f"density is {density!r}; it must be one of {', '.join(get_args(Density))}")
    rewards, turns = turn_rewards.astype(jnp.float32), turn_rewards.shape[1]
    counted = (mask > 0) & (turn >= 0) & (turn < turns)
    position = jnp.arange(turn.shape[1])
    if density == "single":
        last = jnp.max(jnp.where(counted, position, -1), axis=1, keepdims=True, initial=-1)
        return jnp.where(counted & (position == last), rewards.sum(axis=1, keepdims=True), 0.0)
    ids = jnp.where(counted, turn, turns).astype(jnp.int32)
    ends = jax.vmap(lambda row: jax.ops.segment_max(position, row, num_segments=turns + 1))(ids)
    at = jnp.clip(turn, 0, turns - 1).astype(jnp.int32)
    end, reward = (jnp.take_along_axis(per_turn, at, axis=1) for per_turn in (ends, rewards))
    return jnp.where(counted & (position == end), reward, 0.0)


@ranged
def self_correction_rewards(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    step: Int[Array, ""] | None = None,
    *,
    stage: Stage = "second",
    first_stage_steps: Natural = 0,
    alpha: NonNegative = 10.0,
    kl_coefficient: NonNegative | None = None,
) -> Float[Array, "B S"]:
    """Rewards of two attempts with a bonus for the correction, and a KL penalty on each attempt's tokens.

        r_2 <- r_2 + alpha * (r_2 - r_1) - beta * KL_2
        r_1 <- r_1 - beta * KL_1
        KL_s = sum_{t in turn s} (log pi_old_t - log pi_reference_t)

    in the second stage, which rewards progress and penalises spoiling a right attempt. The first stage keeps r_2 and
    has r_1 = -beta * KL_1: it holds the first attempt near the reference. Each turn is credited with its own reward
    only (`turn_leave_one_out`).

    Args:
      turn_rewards: r_1 and r_2, the verdicts on the two attempts.
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count.
      old_logprobs: log-probability of each token under the policy that the update starts from.
      reference_logprobs: under the policy before both stages.
      step: updates made so far; needed with `first_stage_steps`.
      stage: 'first' or 'second'.
      first_stage_steps: number of initial steps in the first stage, for both stages in one run.
      alpha: coefficient of progress in the second stage.
      kl_coefficient: beta, units of reward per nat; None takes 0.1 in the first stage and 0.01 in the second.

    Returns:
      One reward per turn; 0 for a turn that was not taken.

    Raises:
      ValueError: for an unknown stage, another number of turns than two, or first_stage_steps without step.

    Reference: SCoRe (2409.12917).
    Certainty: verified
    """
    chex.assert_rank([turn_rewards, turn, mask, old_logprobs, reference_logprobs], 2)
    chex.assert_equal_shape([turn, mask, old_logprobs, reference_logprobs])
    if stage not in get_args(Stage):
        raise ValueError(f"stage is {stage!r}; it must be one of {', '.join(get_args(Stage))}")
    if turn_rewards.shape[1] != 2:
        raise ValueError(
            f"turn_rewards has {turn_rewards.shape[1]} turns; self-correction compares two attempts, so use an "
            "environment of two turns such as that of the task self_correction"
        )
    if first_stage_steps and step is None:
        raise ValueError(f"first_stage_steps is {first_stage_steps}, which needs step; pass step, or leave it out")
    counted = mask > 0
    per_token = old_logprobs.astype(jnp.float32) - reference_logprobs.astype(jnp.float32)
    mine = [counted & (turn == number) for number in range(2)]
    taken = jnp.stack([here.any(axis=1) for here in mine], axis=1)
    kl = jnp.stack([jnp.sum(jnp.where(here, per_token, 0.0), axis=1) for here in mine], axis=1)
    first, second = jnp.moveaxis(turn_rewards.astype(jnp.float32), 1, 0)

    def beta(default: float) -> float:
        return default if kl_coefficient is None else kl_coefficient

    shaped = {
        "first": jnp.stack([-beta(0.1) * kl[:, 0], second], axis=1),
        "second": jnp.stack([first, second + alpha * (second - first)], axis=1) - beta(0.01) * kl,
    }
    chosen = shaped[stage]
    if first_stage_steps and step is not None:
        chosen = jnp.where(step < first_stage_steps, shaped["first"], chosen)
    return jnp.where(taken, chosen, 0.0)


def _inside(tokens: Int[Array, "B T"], length: Int[Array, "B"]) -> Bool[Array, "B T"]:
    return jnp.arange(tokens.shape[1])[None, :] < length[:, None]


def tokens_per_turn(counted: Bool[Array, "B T"], turn: Int[Array, "B T"], turns: int) -> Int[Array, "B S"]:
    """Number of counted tokens in each of the first `turns` turns of a row."""
    count = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=turns))
    return count(counted.astype(jnp.int32), turn.astype(jnp.int32))
