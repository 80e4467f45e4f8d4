"""An environment of one's own in Python: guess a number between 0 and 9; it answers `+` (more) or `-` (less).

jaxrl train guess.yaml     with     environment: {python: "own_environment:guessing", max_turns: 4}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxrl_llm.data import Tokenizer
from jaxrl_llm.rollout import HostEnvironment


def reset(item: Mapping[str, Any]) -> int:
    """The state of an episode: here what is to be guessed."""
    return int(item["answer"])


def step(number: int, turn: str) -> tuple[int, str, float, bool]:
    """(next state, observation, reward of the turn, whether the episode is over)."""
    guess = turn.removesuffix("<n>").removesuffix("<eos>")
    if not (guess.isascii() and guess.isdigit()):
        return number, "<o>?</o>", 0.0, turn.endswith("<eos>")
    if int(guess) == number:
        return number, "", 1.0, True
    return number, "<o>+</o>" if int(guess) < number else "<o>-</o>", 0.0, turn.endswith("<eos>")


def guessing(tokenizer: Tokenizer, *, max_turns: int = 4) -> HostEnvironment:
    """What `environment.python` names: called with the tokenizer and the other entries of the section."""
    return HostEnvironment(
        reset,
        step,
        max_turns=max_turns,
        max_turn_tokens=2,
        max_observation_tokens=3,
        end_of_turn_ids=(*tokenizer.encode("<n>"), *tokenizer.eos_ids),
        deadline_seconds=5.0,
    )
