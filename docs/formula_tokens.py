"""The words and signs of plain-text formulas: their LaTeX, and the division of a text into tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

GREEK = {
    name: rf"\{name}"
    for name in (
        *("alpha", "beta", "gamma", "delta", "eta", "lambda", "mu", "nu", "phi", "pi", "psi", "rho", "sigma", "tau"),
        *("omega", "theta", "Omega", "Delta", "Phi"),
    )
} | {"eps": r"\varepsilon", "epsilon": r"\varepsilon", "lam": r"\lambda"}
# Functions that LaTeX knows, and others that are set upright. Without parentheses they apply to what follows.
FUNCTIONS = {name: rf"\{name}" for name in ("log", "exp", "max", "min", "tanh", "cos", "sin")} | {
    "sum": r"\sum",
    "log2": r"\log_2",
    "grad": r"\nabla",
}
UPRIGHT = frozenset({"mean", "std", "median", "KL"})
SCRIPTED = frozenset({*GREEK, *FUNCTIONS, *UPRIGHT})
JOINING = frozenset(
    {
        *("a", "and", "as", "at", "by", "each", "else", "elsewhere", "for", "from", "if", "in", "is", "its", "not"),
        *("of", "on", "or", "over", "right", "so", "than", "that", "the", "to", "under", "where", "which", "with"),
        *("without", "wrong"),
    }
)
LOGICAL = frozenset({"where", "if", "else", "and", "or"})
OPERATORS = {
    "<-": r"\leftarrow",
    "->": r"\to",
    ">=": r"\ge",
    "<=": r"\le",
    "!=": r"\ne",
    "==": "=",
    "||": r"\,\Vert\,",
    "+-": r"\pm",
    "*": r"\cdot",
    "<": r"\lt",
    ">": r"\gt",
    "~": r"\sim",
} | {sign: sign for sign in "+-=:"}
BRACKETS = {"(": ("(", ")"), "[": ("[", "]"), "{": (r"\{", r"\}"), "|": (r"\lvert", r"\rvert")}
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}

_TOKEN = re.compile(
    r"""(?P<space>\s*)(?:
      (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?%?)
    | (?P<word></?[a-z]+>|[A-Za-z]+@\w+|[A-Za-z]+(?:-[A-Za-z]{2,})+(?![A-Za-z])|[A-Za-z]{2,}'s\b
        |[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*)
    | (?P<sign><-|->|>=|<=|!=|==|\|\||\+-|\*\*|[-+*/=<>~^_'(){}\[\]|,;:.!?\#`])
    | (?P<other>\S)
    )""",
    re.X,
)


class Token(NamedTuple):
    """A piece of plain text, and whether a space precedes it."""

    text: str
    kind: str
    spaced: bool


def tokens(text: str) -> list[Token]:
    """The pieces of a formula.

    >>> [token.text for token in tokens("A_i <- 2 r_i")]
    ['A_i', '<-', '2', 'r_i']
    """
    found = []
    for match in _TOKEN.finditer(text.strip()):
        kind = next(name for name in ("number", "word", "sign", "other") if match[name] is not None)
        found.append(Token(match[kind], kind, bool(match["space"]) or not found))
    return found
