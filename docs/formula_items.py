"""Translated pieces of formulas, and their LaTeX."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from formula_tokens import GREEK, JOINING


class Item(NamedTuple):
    """A translated piece: an atom (anything that an operator applies to), an operator, prose or punctuation."""

    kind: Literal["atom", "prefix", "operator", "prose", "punctuation"]
    text: str
    spaced: bool


def joined(pieces: list[Item]) -> str:
    """LaTeX of translated pieces, with the spaces that LaTeX does not add itself."""
    text, before = "", None
    for number, item in enumerate(pieces):
        after = pieces[number + 1] if number + 1 < len(pieces) else None
        if item.kind == "prose":
            left = " " if before is not None and before.kind in ("atom", "prefix") else ""
            # A sign after a word such as "if" belongs to the operand after it.
            joining = after is not None and after.kind == "operator" and item.text.split()[-1] in JOINING
            right = " " if joining or (after is not None and after.kind in ("atom", "prefix")) else ""
            text += rf"\text{{{left}{escaped(item.text)}{right}}}"
        elif item.kind == "operator":
            text += f" {item.text} "
        elif item.kind == "punctuation":
            text += item.text + (r"\ " if after is not None and item.text in ",;" else " ")
        else:
            apart = before is not None and before.kind == "atom" and item.spaced
            # LaTeX adds a space after \log, but not after an upright word.
            upright = before is not None and before.kind == "prefix" and before.text.startswith(r"\mathrm")
            bracket = item.text.startswith(("(", "[", r"\left"))
            text += r"\," if apart or (upright and not bracket) else " "
            text += item.text
        before = item
    return re.sub(r" {2,}", " ", text).strip()


def escaped(words: str) -> str:
    return re.sub(r"([#%&$_{}])", r"\\\1", words)


def typewriter(name: str) -> str:
    return rf"\mathtt{{{escaped(name)}}}"


def plain(item: Item) -> str:
    return rf"\text{{{escaped(item.text)}}}" if item.kind == "prose" else item.text


def bare(item: Item) -> str:
    """An operand without the parentheses that a fraction or a superscript makes unnecessary."""
    text = plain(item)
    for left, right in ((r"\left(", r"\right)"), ("(", ")")):
        if text.startswith(left) and text.endswith(right):
            inside = text[len(left) : -len(right)]
            if _balanced(inside):
                return inside.strip()
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for sign in re.findall(r"[()]", text):
        depth += 1 if sign == "(" else -1
        if depth < 0:
            return False
    return depth == 0


def number(text: str) -> str:
    percent = r"\%" if text.endswith("%") else ""
    mantissa, _, exponent = text.rstrip("%").lower().partition("e")
    if not exponent:
        return mantissa + percent
    factor = "" if mantissa in ("1", "1.0") else rf"{mantissa} \times "
    return f"{factor}10^{{{int(exponent)}}}{percent}"


def subscript(text: str) -> str:
    if text in GREEK:
        return GREEK[text]
    return text if len(text) <= 2 or text.isdigit() else rf"\text{{{text}}}"


def with_prose(pieces: list[Item]) -> list[Item]:
    """The pieces with neighbouring words merged into one piece of prose."""
    merged: list[Item] = []
    for item in pieces:
        if item.kind == "prose" and merged and merged[-1].kind == "prose":
            last = merged.pop()
            item = Item("prose", f"{last.text} {item.text}", last.spaced)
        merged.append(item)
    return merged
