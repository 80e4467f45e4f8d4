"""Answers as people and models write them, against references: what the verifiers of mathematics take for the same.

Run with `-s` to see precision and recall by kind.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxrl_llm.rewards import latex_match, number_match, parsed_number


class Pair(NamedTuple):
    kind: str
    reference: str
    completion: str
    same: bool


def pairs() -> list[Pair]:
    found, kind, reference = [], "", ""
    for line in Path(__file__).with_name("answer_pairs.txt").read_text().splitlines():
        mark, text = line[:1], line[2:]
        if mark == "@":
            kind = text
        elif mark == "=":
            reference = text
        elif mark in "+-":
            for spelling in text.split(" ;; "):
                whole = spelling.replace(r"\n", "\n") if "####" in spelling else spelling
                marked = "boxed" in whole or "####" in whole
                found.append(Pair(kind, reference, whole if marked else rf"\boxed{{{whole}}}", mark == "+"))
    return found


PAIRS = pairs()


def judged(function, chosen: list[Pair]) -> tuple[set[str], set[str]]:
    """What it takes wrongly for the same, and what it wrongly does not; precision and recall are printed."""
    verdicts = function([pair.completion for pair in chosen], [pair.reference for pair in chosen])
    counts = Counter((pair.kind, pair.same, bool(said)) for pair, said in zip(chosen, verdicts, strict=True))
    print(f"\n{function.__name__}: {len(chosen)} pairs")
    for kind in [*dict.fromkeys(pair.kind for pair in chosen), ""]:
        right, wrong, missed = (
            sum(counts[one, *key] for one in {pair.kind for pair in chosen} if kind in ("", one))
            for key in ((True, True), (False, True), (True, False))
        )
        label = kind or "all"
        print(f"  {label:16} precision {right / max(right + wrong, 1):.3f}  recall {right / (right + missed):.3f}")
    wrong, missed = (
        {pair.completion for pair, said in zip(chosen, verdicts, strict=True) if (bool(said), pair.same) == key}
        for key in ((True, False), (False, True))
    )
    return wrong, missed


def test_there_are_enough_of_every_kind():
    assert len(PAIRS) > 400
    assert len({(pair.reference, pair.completion) for pair in PAIRS}) == len(PAIRS)
    assert min(Counter(pair.same for pair in PAIRS).values()) > 200
    assert len({pair.kind for pair in PAIRS}) >= 16


def test_numbers():
    """What is refused holds several numbers, or is to be computed; a decimal comma is none."""
    wrong, missed = judged(number_match, [pair for pair in PAIRS if parsed_number(pair.reference) is not None])
    assert wrong == set()
    unfinished = {"50 + 50", r"4 \cdot 25", r"\sqrt{16}", "2^2"}
    assert missed == {rf"\boxed{{{text}}}" for text in {*unfinished, "12 345", "0,125"}}


@pytest.mark.slow
def test_mathematics():
    wrong, missed = judged(latex_match, PAIRS)
    assert wrong == set()
    assert missed == {rf"\boxed{{{text}}}" for text in ("12 345", r"\varnothing", r"x \le 2", "3 + 4 i")}
