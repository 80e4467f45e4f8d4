"""Two independent modular chains: `P:3+5*2-4|6-1*3` -> 5|1."""

from __future__ import annotations

from random import Random

from jaxrl_llm.data.tasks import chain
from jaxrl_llm.data.tasks.items import Item, Task, equality, require_choice
from jaxrl_llm.ranges import Share, ranged


def item(modulus: int, halves: list[tuple[int, list[tuple[str, int]]]], *, parallel: bool) -> Item:
    """The problem of two chains, solved one after the other, or in two threads of one block.

    >>> made = item(7, [(3, [("+", 5)]), (4, [("*", 2)])], parallel=True)
    >>> made.body, made.think, made.answer
    ('P:3+5|4*2', "~'':#13+5=1_#24*2=1_&", '1|1')
    """
    solved = [chain.item(modulus, start, steps) for start, steps in halves]
    body = "P:" + "|".join(one.body.partition(":")[2] for one in solved)
    threads = "".join(f"#{number}{one.think}_" for number, one in enumerate(solved, 1))
    think = f"~{chr(39) * len(solved)}:{threads}&" if parallel else ";".join(one.think for one in solved)
    level = len(halves[0][1])
    return Item(body, think, "|".join(one.answer for one in solved), "two_chains", level, f"two_chains-{level}")


@ranged
def task(*, modulus: int = 7, parallel_share: Share = 0.5) -> Task:
    """Two chains of `level` operations, each reduced modulo `modulus`; the answer has both results.

    Args:
      modulus: 7, 11 or 13.
      parallel_share: share of the reference solutions that solve the halves in threads (see `parallel_threads`).
    """
    require_choice("modulus", modulus, (7, 11, 13))

    def draw(rng: Random, level: int) -> Item:
        halves = [
            (rng.randrange(modulus), [(rng.choice("+-*"), rng.randrange(modulus)) for _ in range(level)])
            for _ in range(2)
        ]
        return item(modulus, halves, parallel=rng.random() < parallel_share)

    return Task(
        name="two_chains",
        draw=draw,
        verify=equality,
        levels=tuple(range(1, 5)),
        last_level=8,
        description=f"two chains of operations modulo {modulus} that do not depend on each other",
        options={"modulus": modulus, "parallel_share": parallel_share},
        scratchpad=True,
    )
