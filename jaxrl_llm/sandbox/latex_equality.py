"""The function of the process of `latex_match`; imported only there, since math-verify is slow to import."""

from __future__ import annotations

from math_verify import parse, verify  # the extra math


def equal(answer: str, said: str) -> bool | None:
    """Whether two LaTeX expressions are mathematically equal; None if the first cannot be parsed."""
    gold, target = parse(f"${answer}$"), parse(f"${said}$")
    return bool(target and verify(gold, target)) if gold else None
