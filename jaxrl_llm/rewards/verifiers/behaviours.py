"""Search behaviours in a scratchpad: steps, backtracking, verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Behaviour = Literal["step", "backtracking", "verification"]


def behaviour_counts(
    completions: Sequence[str],
    *,
    behaviour: Behaviour = "backtracking",
    separator: str = ";",
    refused: str = "no",
    accepted: str = "yes",
    opening: str = "<t>",
    closing: str = "</t>",
) -> list[float]:
    """Counts of a behaviour in each scratchpad: a reading for `metric/NAME`, or a reward.

    A step contains an equals sign; `refused` marks backtracking, `accepted` a verification against the target. The
    scratchpad is the text between `opening` and `closing`, or the whole completion without them.

    Args:
      completions: decoded completions.
      behaviour: step, backtracking or verification.
      separator: between the parts of a scratchpad.
      refused, accepted: parts that mark backtracking and verification.
      opening, closing: tags around the scratchpad.

    Returns:
      One count per completion.

    Raises:
      ValueError: for an unknown behaviour.

    >>> scratch = "<t>12-6=6;6*3=18;no;12*3=36;36-6=30;yes</t><a>12*3-6</a>"
    >>> [behaviour_counts([scratch, "<t></t>"], behaviour=name) for name in ("step", "backtracking", "verification")]
    [[4.0, 0.0], [1.0, 0.0], [1.0, 0.0]]

    Reference: cognitive behaviours and priming (2503.01307).
    Certainty: verified
    """
    if behaviour not in get_args(Behaviour):
        raise ValueError(f"behaviour is {behaviour!r}; it must be one of {', '.join(get_args(Behaviour))}")
    counts = []
    for completion in completions:
        inside = completion.split(opening, 1)[-1].split(closing, 1)[0]
        parts = [part.strip() for part in inside.split(separator)]
        if behaviour == "step":
            counts.append(float(sum("=" in part for part in parts)))
        else:
            counts.append(float(parts.count(refused if behaviour == "backtracking" else accepted)))
    return counts
