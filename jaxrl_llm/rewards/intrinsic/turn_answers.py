"""The reference answer after each turn of a conversation: a view with several sequences per row."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.experience import Branches
from jaxrl_llm.ranges import Count, Natural, ranged
from jaxrl_llm.rewards.intrinsic.thoughts import framed_answers


@ranged
def answer_after_turns(
    turn: Int[Array, "B T"],
    length: Int[Array, "B"],
    answer_tokens: Int[Array, "B A"],
    answer_length: Int[Array, "B"],
    *,
    max_turns: Count,
    opening_ids: tuple[Natural, ...] | None = None,
    closing_ids: tuple[Natural, ...] | None = None,
) -> Branches:
    """The reference answer after the prompt, and after each turn or step including its observation.

    All are scored in one pass over the row. `answer_likelihood` turns each into a number.

    Args:
      turn: index of the turn that each token belongs to, non-decreasing along a row.
      length: completion tokens, observations included.
      answer_tokens: reference answer, right-padded.
      answer_length: tokens in each reference answer.
      max_turns: S, number of turns after which it is scored.
      opening_ids: tokens before the answer, such as its opening tag, which are scored; None for none.
      closing_ids: tokens after it, such as its closing tag; None for none.

    Returns:
      `Branches`: S + 1 sequences per row, after 0 to S turns. The mask is 0 for turns that were not taken.

    Reference: IGPO (2510.14967).
    Certainty: verified
    """
    chex.assert_rank([turn, length, answer_tokens, answer_length], [2, 1, 2, 1])
    chex.assert_equal_shape_prefix([turn, length, answer_tokens, answer_length], 1)
    count = max_turns + 1
    number = jnp.arange(count)
    inside = jnp.arange(turn.shape[1]) < length[:, None]
    earlier = inside[:, None, :] & (turn[:, None, :] < number[None, :, None])
    taken = jnp.where(inside, turn, -1).max(axis=1, initial=-1) + 1
    scored, size, held = framed_answers(answer_tokens, answer_length, opening_ids or (), closing_ids or ())
    mask = held[:, None, :] & (number[None, :] <= taken[:, None])[..., None]
    every = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))  # noqa: E731
    return Branches(earlier.sum(axis=2).astype(jnp.int32), every(scored), every(size), mask.astype(jnp.float32))
