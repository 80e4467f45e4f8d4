"""The function that `latex_match` calls in another process; only that process imports math-verify, which is slow."""

from __future__ import annotations

from math_verify import parse, verify  # the extra math


def equal(answer: str, said: str) -> bool | None:
    """Whether two LaTeX expressions are mathematically equal; None if the first cannot be parsed."""
    gold, target = parse(f"${answer}$"), parse(f"${said}$")
    return bool(target and verify(gold, target)) if gold else None
