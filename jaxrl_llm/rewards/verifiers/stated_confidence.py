"""The confidence that a completion states: a reading of text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxrl_llm.ranges import Positive, ranged

_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)")


@ranged
def stated_confidence(
    completions: Sequence[str], *, opening: str = "<confidence>", closing: str = "</confidence>", scale: Positive = 1.0
) -> list[float | None]:
    """The stated probability that the completion's answer is right.

    The number is between the last opening tag and the next closing one. `80%` is 0.8 on any scale.

    Args:
      completions: decoded completions.
      opening: text before the number.
      closing: text after it.
      scale: number for certainty: 1 for shares, 100 for percent without the sign.

    Returns:
      One number per row; None without a number in [0, scale].

    Raises:
      ValueError: for a scale that is not above 0.

    >>> stated_confidence(["<a>7</a><c>80</c>", "<a>7</a>", "<c>170</c>"], opening="<c>", closing="</c>", scale=100)
    [0.8, None, None]

    Reference: RLCR (2507.16806).
    Certainty: verified
    """
    return [_confidence(text, opening, closing, scale) for text in completions]


def _confidence(text: str, opening: str, closing: str, scale: float) -> float | None:
    _, found, rest = text.rpartition(opening)
    inner, closed, _ = rest.partition(closing)
    number = _NUMBER.fullmatch(inner.strip()) if found and closed else None
    if number is None:
        return None
    confidence = float(number[1]) / (100.0 if number[2] else scale)
    return confidence if confidence <= 1 else None
