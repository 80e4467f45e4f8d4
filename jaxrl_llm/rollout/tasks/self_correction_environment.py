"""Two attempts at a problem; between them, every first attempt is answered with the same request to revise it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.data.tasks.self_correction import REVISE
from jaxrl_llm.data.tokenizer import CharacterTokenizer
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rewards import exact_answer
from jaxrl_llm.rollout.environments import Environment, Start, Step

_TOKENIZER = CharacterTokenizer()


class Attempts(NamedTuple):
    """The state of an episode.

    Attributes:
      answer_tokens: the reference answer, right-padded.
      answer_length: number of its tokens.
      taken: number of attempts so far.
      right: 1 for each right attempt.
    """

    answer_tokens: Int[Array, "A"]
    answer_length: Int[Array, ""]
    taken: Int[Array, ""]
    right: Float[Array, "2"]


@ranged
def two_attempts(*, max_turn_tokens: Count = 64) -> Environment:
    """A first attempt, the observation `<r>` and newline, and a second attempt; a right attempt has reward 1, else 0.

    The second turn follows however the first one ended (`<n>`, end of sequence, or the limit on tokens).

    Args:
      max_turn_tokens: largest number of tokens of an attempt.

    Returns:
      The environment. The metrics are `first_right` and `second_right`, the gain `delta`, and the shares of episodes
      that go from wrong to right (`wrong_to_right`) and from right to wrong (`right_to_wrong`).
    """
    request = jnp.asarray(_TOKENIZER.encode(REVISE), jnp.int32)

    def reset(start: Start, key: Array) -> Attempts:
        del key
        return Attempts(start.answer_tokens, start.answer_length, jnp.int32(0), jnp.zeros(2, jnp.float32))

    def step(state: Attempts, turn_tokens: Array, turn_length: Array, key: Array) -> Step:
        del key
        right = exact_answer(
            turn_tokens[None], turn_length[None], state.answer_tokens[None], state.answer_length[None]
        )[0]
        over: Bool[Array, ""] = state.taken >= 1
        state = state._replace(taken=state.taken + 1, right=jnp.where(jnp.arange(2) == state.taken, right, state.right))
        return Step(state, request, jnp.int32(len(request)), right, over)

    def metrics(state: Attempts) -> dict[str, tuple[Array, Array]]:
        first, second = state.right
        # An episode without a second attempt is not counted in the comparisons of both.
        both = (state.taken >= 2).astype(jnp.float32)
        return {
            "first_right": (first, (state.taken >= 1).astype(jnp.float32)),
            "second_right": (second, both),
            "delta": ((second - first) * both, both),
            "wrong_to_right": ((1 - first) * second * both, both),
            "right_to_wrong": (first * (1 - second) * both, both),
        }

    return Environment(
        reset=reset,
        step=step,
        max_turns=2,
        max_turn_tokens=max_turn_tokens,
        max_observation_tokens=len(request),
        end_of_turn_ids=(_TOKENIZER.id("<n>"), _TOKENIZER.eos_id),
        metrics=metrics,
        solved=lambda state: state.right[1] > 0,
    )
