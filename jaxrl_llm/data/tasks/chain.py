"""Modular chain: `M7:3+5*2-4` -> 5, evaluated from left to right modulo a small prime."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from jaxrl_llm.data.tasks.items import Item, Task, equality, require_bool, require_choice
from jaxrl_llm.ranges import Share, ranged


def item(modulus: int, start: int, steps: list[tuple[str, int]], *, scratchpad: bool = True) -> Item:
    """The problem of applying (operator, operand) steps to a start value.

    >>> item(7, 3, [("+", 5), ("*", 2), ("-", 4)]).think
    '3+5=1;1*2=2;2-4=5'
    """
    value, written = start, []
    for operator, x in steps:
        result = value + x if operator == "+" else value - x if operator == "-" else value * x
        written.append(f"{value}{operator}{x}={result % modulus}")
        value = result % modulus
    body = f"M{modulus}:{start}" + "".join(f"{operator}{x}" for operator, x in steps)
    think = ";".join(written) if scratchpad else ""
    return Item(body, think, str(value), "chain", len(steps), f"chain-{len(steps)}")


def judged(asked: Item, modulus: int, off: int, *, second: bool) -> Item:
    """A judge's question about a problem: which of two claimed results is right, the first (A) or the second (B).

    >>> judged(item(7, 3, [("+", 5)]), 7, 2, second=True).body
    'M7:3+5?3|1'
    """
    wrong = str((int(asked.answer) + off) % modulus)
    first, other = (wrong, asked.answer) if second else (asked.answer, wrong)
    return replace(asked, body=f"{asked.body}?{first}|{other}", answer="AB"[second])


@ranged
def task(*, modulus: int = 7, scratchpad: bool = True, direct_share: Share = 0.0, claims: bool = False) -> Task:
    """A chain of `level` operations out of + - *, each reduced modulo `modulus`. Guessing is right with 1/modulus.

    Args:
      modulus: 7, 11 or 13.
      scratchpad: write every intermediate value before the answer.
      direct_share: share of the problems whose reference solution leaves the scratch empty, so that a policy that has
        learned from both kinds writes completions of very different lengths, and may choose.
      claims: a judge's question: two results are claimed behind the problem, of which one is right, and the answer is
        which one, A or B. Guessing is right with 1/2.
    """
    require_choice("modulus", modulus, (7, 11, 13))
    require_bool("scratchpad", scratchpad)
    require_bool("claims", claims)

    def draw(rng: Random, level: int) -> Item:
        start = rng.randrange(modulus)
        steps = [(rng.choice("+-*"), rng.randrange(modulus)) for _ in range(level)]
        direct = bool(direct_share) and rng.random() < direct_share
        made = item(modulus, start, steps, scratchpad=scratchpad and not direct)
        return judged(made, modulus, rng.randrange(1, modulus), second=rng.random() < 0.5) if claims else made

    return Task(
        name="chain",
        draw=draw,
        verify=equality,
        levels=tuple(range(1, 9)),
        last_level=16,
        description=f"operations modulo {modulus} from left to right; the level is the number of operations",
        # Options are part of the random stream: problems without claims stay as they were.
        options={"modulus": modulus, "scratchpad": scratchpad, "direct_share": direct_share}
        | ({"claims": True} if claims else {}),
        scratchpad=scratchpad,
        identity=lambda made: made.body.partition("?")[0],
    )
