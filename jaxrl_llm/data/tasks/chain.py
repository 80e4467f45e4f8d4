"""Modular chain: `M7:3+5*2-4` -> 5, evaluated from left to right modulo a small prime."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

from jaxrl_llm.data.tasks.items import Item, Task, equality, require_bool, require_choice
from jaxrl_llm.ranges import Share, ranged


def item(
    modulus: int, start: int, steps: list[tuple[str, int]], *, scratchpad: bool = True, repeated: bool = False
) -> Item:
    """The problem of applying (operator, operand) steps to a start value; `repeated` writes all of them a second time.

    >>> item(7, 3, [("+", 5), ("*", 2), ("-", 4)]).think
    '3+5=1;1*2=2;2-4=5'
    >>> item(7, 3, [("+", 5), ("*", 2)], repeated=True).think
    '3+5=1;1*2=2;3+5=1;1*2=2'
    """
    value, written = start, []
    for operator, x in steps:
        result = value + x if operator == "+" else value - x if operator == "-" else value * x
        written.append(f"{value}{operator}{x}={result % modulus}")
        value = result % modulus
    body = f"M{modulus}:{start}" + "".join(f"{operator}{x}" for operator, x in steps)
    think = ";".join(written * (2 if repeated else 1)) if scratchpad else ""
    return Item(body, think, str(value), "chain", len(steps), f"chain-{len(steps)}")


def judged(asked: Item, modulus: int, off: int, *, second: bool) -> Item:
    """A judge's question about a problem: which of two claimed results is right, the first (A) or the second (B).

    >>> judged(item(7, 3, [("+", 5)]), 7, 2, second=True).body
    'M7:3+5?3|1'
    """
    wrong = str((int(asked.answer) + off) % modulus)
    first, other = (wrong, asked.answer) if second else (asked.answer, wrong)
    return replace(asked, body=f"{asked.body}?{first}|{other}", answer="AB"[second])


def attempted(asked: Item, modulus: int, off: int) -> Item:
    """A critic's question about a problem: whether a given result is right, Y or N.

    >>> attempted(item(7, 3, [("+", 5)]), 7, 2).body, attempted(item(7, 3, [("+", 5)]), 7, 0).answer
    ('M7:3+5?3', 'Y')
    """
    result = (int(asked.answer) + off) % modulus
    return replace(asked, body=f"{asked.body}?{result}", answer="N" if off else "Y")


def parsed(body: str) -> tuple[int, int, list[tuple[str, int]]]:
    """(modulus, start, steps) of a problem, also of a judge's or critic's question.

    >>> parsed("M7:3+5*2?4")
    (7, 3, [('+', 5), ('*', 2)])
    """
    modulus, _, rest = body.partition("?")[0].removeprefix("M").partition(":")
    start, *steps = re.findall(r"[-+*]?[0-9]+", rest)
    return int(modulus), int(start), [(step[0], int(step[1:])) for step in steps]


def solution(record: Mapping[str, Any]) -> dict[str, Any]:
    """The column `solution`: the result of the chain itself, for a judge's or critic's question."""
    return {"solution": item(*parsed(record["body"])).answer}


@ranged
def task(
    *,
    modulus: int = 7,
    scratchpad: bool = True,
    direct_share: Share = 0.0,
    repeated_share: Share = 0.0,
    claims: bool = False,
    attempts: Share = 0.0,
) -> Task:
    """A chain of `level` operations out of + - *, each reduced modulo `modulus`. A guess is right with 1/modulus.

    Args:
      modulus: 7, 11 or 13.
      scratchpad: write every intermediate value before the answer.
      direct_share: share of the problems whose reference solution has an empty scratch, so that a policy trained on
        both kinds samples completions of very different lengths.
      repeated_share: share of the written scratches that work out the chain twice, so that right answers of every
        problem have two lengths and the longer one is no better.
      claims: problems are a judge's questions: two claimed results follow the problem, one of them is right, and the
        answer is which one, A or B. A guess is right with 1/2.
      attempts: share of the problems that are a critic's question: a result follows the problem, right in half of the
        cases, and the answer is whether it is right, Y or N. The column `solution` has the result of the chain.
    """
    require_choice("modulus", modulus, (7, 11, 13))
    require_bool("scratchpad", scratchpad)
    require_bool("claims", claims)
    if claims and attempts:
        raise ValueError(f"attempts is {attempts} and claims is true, which exclude each other; remove one of them")

    def draw(rng: Random, level: int) -> Item:
        start = rng.randrange(modulus)
        steps = [(rng.choice("+-*"), rng.randrange(modulus)) for _ in range(level)]
        direct = bool(direct_share) and rng.random() < direct_share
        repeated = bool(repeated_share) and rng.random() < repeated_share
        made = item(modulus, start, steps, scratchpad=scratchpad and not direct, repeated=repeated)
        if claims:
            return judged(made, modulus, rng.randrange(1, modulus), second=rng.random() < 0.5)
        if attempts and rng.random() < attempts:
            return attempted(made, modulus, rng.randrange(1, modulus) if rng.random() < 0.5 else 0)
        return made

    return Task(
        name="chain",
        draw=draw,
        verify=equality,
        levels=tuple(range(1, 9)),
        last_level=16,
        description=f"operations modulo {modulus} from left to right; the level is the number of operations",
        # Options are part of the random seed; later ones are omitted at their defaults, so that existing data do not
        # change.
        options={"modulus": modulus, "scratchpad": scratchpad, "direct_share": direct_share}
        | ({"repeated_share": repeated_share} if repeated_share else {})
        | ({"claims": True} if claims else {})
        | ({"attempts": attempts} if attempts else {}),
        scratchpad=scratchpad,
        identity=lambda made: made.body.partition("?")[0],
        columns=solution if attempts else None,
    )
