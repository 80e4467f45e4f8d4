"""Turns inside a completion, and a reward for each turn that a reference took as well."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# `;` of `jaxrl_llm.data.CharacterTokenizer`, which ends a step of a scratchpad; a test holds the two together.
SEPARATOR_ID = 87


def separated_turns(
    tokens: Int[Array, "B T"], length: Int[Array, "B"], *, separator_id: int = SEPARATOR_ID
) -> Int[Array, "B T"]:
    """The turn of each token: how many separators stand before it. A separator belongs to the turn that it ends.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      separator_id: id of the token that ends a turn; by default the one that ends a step of a scratchpad.

    Returns:
      One index a token, from 0; padding continues the last turn.

    >>> separated_turns(jnp.array([[20, 87, 21, 22, 87]]), jnp.array([5])).tolist()
    [[0, 0, 1, 1, 1]]
    """
    chex.assert_rank([tokens, length], [2, 1])
    chex.assert_equal_shape_prefix([tokens, length], 1)
    ends = ((tokens == separator_id) & _inside(tokens, length)).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def reference_progress(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    turn: Int[Array, "B T"],
    demonstration_tokens: Int[Array, "B T"],
    demonstration_length: Int[Array, "B"],
    *,
    max_turns: int,
    separator_id: int = SEPARATOR_ID,
) -> Float[Array, "B S"]:
    """1 for each turn whose tokens are those of the reference's turn, else 0.

        r_s = [ tokens of turn s == reference's tokens of turn s ]

    The drop, in that turn, of the distance "turns of the reference that are not reproduced".

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      turn: index of the turn of each token (`separated_turns`).
      demonstration_tokens: reference completion, right-padded.
      demonstration_length: tokens in each reference completion.
      max_turns: turns that are rewarded, S; those beyond have no reward.
      separator_id: id of the token that ends a turn of the reference.

    Returns:
      One reward a turn; 0 for a turn that either of the two did not take.

    Raises:
      ValueError: for no turns.
    """
    chex.assert_rank([tokens, length, turn, demonstration_tokens, demonstration_length], [2, 1, 2, 2, 1])
    chex.assert_equal_shape([tokens, turn])
    if max_turns < 1:
        raise ValueError(
            f"max_turns is {max_turns}; it is the number of turns that are rewarded and must be at least 1"
        )
    if 0 in (tokens.shape[1], demonstration_tokens.shape[1]):
        return jnp.zeros((tokens.shape[0], max_turns), jnp.float32)
    reference_turn = separated_turns(demonstration_tokens, demonstration_length, separator_id=separator_id)
    inside = _inside(tokens, length)
    size = _sum_per_turn(inside, turn, max_turns)
    reference_size = _sum_per_turn(_inside(demonstration_tokens, demonstration_length), reference_turn, max_turns)
    first, reference_first = (jnp.cumsum(count, axis=1) - count for count in (size, reference_size))
    # Each token is compared with the reference's token at the same place of the same turn.
    shift = jnp.take_along_axis(reference_first - first, jnp.clip(turn, 0, max_turns - 1), axis=1)
    position = jnp.arange(tokens.shape[1])[None, :] + shift
    at = jnp.clip(position, 0, demonstration_tokens.shape[1] - 1)
    same = jnp.take_along_axis(demonstration_tokens, at, axis=1) == tokens
    equal = _sum_per_turn(inside & same, turn, max_turns) == size
    return (equal & (size == reference_size) & (size > 0)).astype(jnp.float32)


def _inside(tokens: Int[Array, "B T"], length: Int[Array, "B"]) -> Bool[Array, "B T"]:
    return jnp.arange(tokens.shape[1])[None, :] < length[:, None]


def _sum_per_turn(counted: Bool[Array, "B T"], turn: Int[Array, "B T"], turns: int) -> Int[Array, "B S"]:
    """How many tokens count in each of the first `turns` turns of a row."""
    count = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=turns))
    return count(counted.astype(jnp.int32), turn.astype(jnp.int32))
