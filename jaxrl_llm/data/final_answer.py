r"""The final answer of a worked solution: after `####`, or in the last `\boxed{}`."""

from __future__ import annotations

import re

HASHES = "####"
# The content of \boxed, or of \fbox in older solutions.
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# An escaped brace is text and closes no box.
_BRACE = re.compile(r"\\[{}]|[{}]")


def after_hashes(text: str) -> str | None:
    """The text after the last `####`, up to the end of its line; None if there is none.

    >>> after_hashes("4*12=48 clips\\n#### 48")
    '48'
    """
    _, found, rest = text.rpartition(HASHES)
    return (rest.strip().splitlines() or [""])[0].strip() if found else None


def in_last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, with balanced braces; None if there is none.

    A box that is not closed, as in a truncated completion, does not count.

    >>> in_last_box(r"so \boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    span = last_box_span(text)
    return None if span is None else text[slice(*span)].strip()


def last_box_span(text: str) -> tuple[int, int] | None:
    """Start and end of the content of the last closed box."""
    boxes = {match.end() for match in _BOX.finditer(text)}
    opened: list[int] = []
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.end())
        elif brace.group() == "}" and opened:
            start = opened.pop()
            if start in boxes and (last is None or start > last[0]):
                last = start, brace.start()
    return last


def marked_answer(text: str) -> str | None:
    r"""The answer at the last mark of either kind, `####` or a closed `\boxed{}`; None if there is no mark.

    >>> marked_answer("#### 7, I mean \\boxed{8}")
    '8'
    """
    span, hashes = last_box_span(text), text.rfind(HASHES)
    if span is not None and span[0] > hashes:
        return in_last_box(text)
    return after_hashes(text)
