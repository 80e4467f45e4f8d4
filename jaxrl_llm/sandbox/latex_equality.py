"""What the process of `latex_match` computes; it is imported there alone, as math-verify takes long to import."""

from __future__ import annotations

from math_verify import parse, verify  # the extra math


def equal(answer: str, said: str) -> bool | None:
    """Whether two pieces of LaTeX are the same mathematics; None where the first is none."""
    gold, target = parse(f"${answer}$"), parse(f"${said}$")
    return bool(target and verify(gold, target)) if gold else None
