"""The environment of own_environment.py inside the program: guess a number from 0 to 9; it answers `+` or `-`.

jaxrl train guess.yaml     with     environment: {python: "own_environment_in_jax:guessing", max_turns: 4}

Both functions are of one row, pure, and of arrays of fixed sizes. The rollout maps them over rows and compiles them in
the step, so nothing waits for Python.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.data import Tokenizer
from jaxrl_llm.rollout.environments import Environment, Start, Step


class Guess(NamedTuple):
    """The state of an episode: any pytree whose shapes never change."""

    number: jax.Array  # what is to be guessed
    turns: jax.Array
    right: jax.Array


def guessing(tokenizer: Tokenizer, *, max_turns: int = 4) -> Environment:
    """What `environment.python` names: called with the tokenizer and the other entries of the section."""
    one = lambda text: tokenizer.encode(text)[0]  # noqa: E731
    digits = jnp.asarray([one(digit) for digit in "0123456789"])
    opens, closes, more, less, what = (one(text) for text in ("<o>", "</o>", "+", "-", "?"))
    ends = jnp.asarray(tokenizer.eos_ids)

    def reset(start: Start, key: jax.Array) -> Guess:
        del key  # of this episode: for environments that draw
        return Guess(jnp.argmax(digits == start.answer_tokens[0]), jnp.int32(0), jnp.bool_(False))

    def step(state: Guess, turn: jax.Array, length: jax.Array, key: jax.Array) -> Step:
        del key
        length = jnp.minimum(length, 2)
        read = digits == turn[:2, None]  # [2, 10]: which digit each token is
        stopped = jnp.isin(turn[length - 1], ends)
        end = stopped | (turn[length - 1] == one("<n>"))
        shown = length - end  # tokens before the end; what stands behind the turn is not read
        is_guess = (shown > 0) & read[0].any() & ((shown < 2) | read[1].any())
        value = jnp.argmax(read, 1)
        guess = jnp.where(shown == 2, 10 * value[0] + value[1], value[0])
        right = is_guess & (guess == state.number)
        answer = jnp.where(is_guess, jnp.where(guess < state.number, more, less), what)
        return Step(
            state=Guess(state.number, state.turns + 1, right),
            observation=jnp.stack([jnp.int32(opens), answer.astype(jnp.int32), jnp.int32(closes)]),
            observation_length=jnp.int32(3),
            reward=right.astype(jnp.float32),
            done=right | stopped,
        )

    return Environment(
        reset,
        step,
        max_turns=max_turns,
        max_turn_tokens=2,
        max_observation_tokens=3,
        end_of_turn_ids=(one("<n>"), *tokenizer.eos_ids),
        metrics=lambda state: {"guesses_per_episode": (state.turns, jnp.int32(1))},
        solved=lambda state: state.right,
    )
