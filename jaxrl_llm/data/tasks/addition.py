"""Addition with carries: `A:47+85` -> 132, with one scratch column per digit."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from random import Random
from string import ascii_lowercase
from typing import Any

from jaxrl_llm.data.tasks.items import Item, Task, equality, reference_response, require_bool, split_of


def columns(a: int, b: int) -> list[str]:
    """Column sums from the least significant digit, each `x+y+carry=sum` with a two-digit sum.

    >>> columns(47, 85)
    ['7+5+0=12', '4+8+1=13']
    """
    width = max(len(str(a)), len(str(b)))
    carry, written = 0, []
    for x, y in zip(reversed(f"{a:0{width}d}"), reversed(f"{b:0{width}d}"), strict=True):
        total = int(x) + int(y) + carry
        written.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return written


def item(a: int, b: int, *, level: int, scratchpad: bool = True) -> Item:
    """The problem a + b."""
    think = ";".join(columns(a, b)) if scratchpad else ""
    return Item(f"A:{a}+{b}", think, str(a + b), "addition", level, f"addition-{level}")


def with_confidence(record: Mapping[str, Any], *, scratchpad: bool) -> str:
    """The reference completion, followed by an uninformative confidence in percent: a hash of the problem.

    >>> with_confidence({"body": "A:4+8", "think": "", "answer": "12"}, scratchpad=False)
    '<a>12</a><c>67</c>'
    """
    percent = 10 + zlib.crc32(record["body"].encode()) // 10 % 90
    return reference_response(record, scratchpad).removesuffix("<eos>") + f"<c>{percent}</c>"


def paraphrase(body: str) -> str:
    """The sum with its numbers exchanged, if that is a problem of the same split; else the body itself.

    >>> paraphrase("A:47+85"), paraphrase("A:4+7")
    ('A:47+85', 'A:7+4')
    """
    left, _, right = body.removeprefix("A:").partition("+")
    swapped = f"A:{right}+{left}"
    return swapped if split_of(swapped) == split_of(body) else body


def scaffold(body: str, answer: str) -> str:
    """The problem after requirements for the answer: each digit, with a letter for its place from the end.

    >>> scaffold("A:47+85", "132")
    'a2;b3;c1;A:47+85'
    """
    return "".join(f"{place}{digit};" for place, digit in zip(ascii_lowercase, answer[::-1], strict=False)) + body


def task(*, scratchpad: bool = True, confidence: bool = False) -> Task:
    """Addition of two numbers of exactly `level` digits (level 1: 0 to 9).

    Args:
      scratchpad: write the columns before the answer; without them the task is much harder.
      confidence: reference completions state a confidence after the answer, for methods that reward calibration.
    """
    require_bool("scratchpad", scratchpad)
    require_bool("confidence", confidence)

    def draw(rng: Random, level: int) -> Item:
        low, high = (0 if level == 1 else 10 ** (level - 1)), 10**level - 1
        return item(rng.randint(low, high), rng.randint(low, high), level=level, scratchpad=scratchpad)

    def columns_of(record: Mapping[str, Any]) -> dict[str, Any]:
        found = {"paraphrase": paraphrase(record["body"]), "scaffold": scaffold(record["body"], record["answer"])}
        return found | ({"response": with_confidence(record, scratchpad=scratchpad)} if confidence else {})

    return Task(
        name="addition",
        draw=draw,
        verify=equality,
        levels=tuple(range(1, 9)),
        last_level=16,
        description="sum of two numbers; the level is the number of digits",
        # Newer options are recorded only if they are not the default, so that existing data sets do not change.
        options={"scratchpad": scratchpad} | ({"confidence": True} if confidence else {}),
        scratchpad=scratchpad,
        columns=columns_of,
    )
