"""Exact values of arithmetic expressions, by a parser for a small grammar; text is never executed as Python code.

sum     = product (("+" | "-") product)*
product = atom (("*" | "/") atom)*
atom    = integer | "(" sum ")"
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

_DIGITS = "0123456789"


class ExpressionError(ValueError):
    """The text is not an expression of the grammar, or its value is undefined."""


class Expression(NamedTuple):
    """A parsed expression.

    Attributes:
      value: its exact value.
      integers: the integers written in it, in order.
    """

    value: Fraction
    integers: tuple[int, ...]


def parse(text: str, *, max_characters: int = 200, max_nesting: int = 20) -> Expression:
    """Parse and evaluate an expression over non-negative integers with + - * / and parentheses.

    There is no unary minus and no white space. Length and nesting are bounded because the text may come from a model.

    Args:
      text: the expression.
      max_characters: longest allowed text.
      max_nesting: deepest allowed nesting of parentheses.

    Returns:
      The exact value and the integers in order.

    Raises:
      ExpressionError: for anything else, a division by zero included.

    >>> parse("(12-7)*3/2")
    Expression(value=Fraction(15, 2), integers=(12, 7, 3, 2))
    """
    if len(text) > max_characters:
        raise ExpressionError(f"the expression has {len(text)} characters; at most {max_characters} are allowed")
    integers: list[int] = []
    position = 0

    def peek() -> str:
        return text[position] if position < len(text) else ""

    def atom(nesting: int) -> Fraction:
        nonlocal position
        start = position
        if peek() == "(":
            if nesting == max_nesting:
                raise ExpressionError(f"more than {max_nesting} nested parentheses at position {position}")
            position += 1
            value = total(nesting + 1)
            if peek() != ")":
                raise ExpressionError(f"')' is missing at position {position} of {text!r}")
            position += 1
            return value
        while peek() != "" and peek() in _DIGITS:
            position += 1
        if start == position:
            raise ExpressionError(f"an integer or '(' is missing at position {position} of {text!r}")
        integers.append(int(text[start:position]))
        return Fraction(integers[-1])

    def product(nesting: int) -> Fraction:
        nonlocal position
        value = atom(nesting)
        while peek() in ("*", "/"):
            operator = peek()
            position += 1
            right = atom(nesting)
            if operator == "/" and right == 0:
                raise ExpressionError(f"division by zero before position {position} of {text!r}")
            value = value * right if operator == "*" else value / right
        return value

    def total(nesting: int) -> Fraction:
        nonlocal position
        value = product(nesting)
        while peek() in ("+", "-"):
            operator = peek()
            position += 1
            right = product(nesting)
            value = value + right if operator == "+" else value - right
        return value

    value = total(0)
    if position != len(text):
        raise ExpressionError(f"unexpected {peek()!r} at position {position} of {text!r}")
    return Expression(value, tuple(integers))
