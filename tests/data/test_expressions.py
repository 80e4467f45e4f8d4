"""The expression grammar: exact values, and nothing that is not in it."""

from __future__ import annotations

from fractions import Fraction

import pytest

from jaxrl_llm.data.tasks.expressions import ExpressionError, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*3-6", 30),
        ("8/(3-8/3)", 24),
        ("2-3-4", -5),
        ("24/4/3", 2),
        ("2+3*4", 14),
        ("((7))", 7),
        ("1/3+1/3+1/3", 1),
        ("7/2", Fraction(7, 2)),
    ],
)
def test_exact_values(text, value):
    assert parse(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-3",
        "3*-2",
        "+3",
        "3+",
        "(3",
        "3)",
        "3 + 4",
        "3**2",
        "3//2",
        "2(3)",
        "()",
        "1/0",
        "1/(2-2)",
        "x",
        "1.5",
        "²",
        "٣",
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ExpressionError):
        parse(text)


def test_length_and_nesting_are_bounded():
    assert parse("(" * 20 + "1" + ")" * 20).value == 1
    with pytest.raises(ExpressionError, match="nested"):
        parse("(" * 21 + "1" + ")" * 21)
    with pytest.raises(ExpressionError, match="characters"):
        parse("1" * 100_000)
