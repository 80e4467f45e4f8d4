"""Format reward of the turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence


def turn_format_reward(
    completions: Sequence[str],
    *,
    turn: str = r"<a>[^<>]+</a>(<n>)?",
    observation: str = r"<o>.*?</o>",
) -> list[float]:
    r"""Share of a conversation's turns that match a pattern, scaled to [-1, 1].

        r = 2 mean_s [turn s matches] - 1,   0 without a turn

    Args:
      completions: decoded conversations.
      turn: a regular expression for the whole text of a turn.
      observation: a regular expression for observations, which separate the turns.

    Returns:
      One reward per row in [-1, 1].

    Raises:
      ValueError: for an invalid regular expression.

    >>> texts = ["<a>U</a><n><o>....#</o><a>L</a><n><o>...##</o>L", "<a>U</a><n>", ""]
    >>> [round(reward, 6) for reward in turn_format_reward(texts)]
    [0.333333, 1.0, 0.0]

    Reference: Mobile-R1 (2506.20332).
    Certainty: recalled
    """
    try:
        form, between = re.compile(turn, re.S), re.compile(observation, re.S)
    except re.error as error:
        raise ValueError(
            f"turn_format_reward has an invalid regular expression: {error}; correct turn or observation"
        ) from None
    found = []
    for completion in completions:
        turns = [text for text in between.split(completion) if text]
        right = sum(form.fullmatch(text) is not None for text in turns)
        found.append(2.0 * right / len(turns) - 1.0 if turns else 0.0)
    return found
