"""Addition with carries: `A:47+85` -> 132, with one scratch column a digit."""

from __future__ import annotations

from random import Random

from jaxrl_llm.data.tasks.items import Item, Task, equality, require_bool


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


def task(*, scratchpad: bool = True) -> Task:
    """Addition of two numbers of exactly `level` digits (level 1: 0 to 9).

    Args:
      scratchpad: write the columns before the answer; without them the task is much harder.
    """
    require_bool("scratchpad", scratchpad)

    def draw(rng: Random, level: int) -> Item:
        low, high = (0 if level == 1 else 10 ** (level - 1)), 10**level - 1
        return item(rng.randint(low, high), rng.randint(low, high), level=level, scratchpad=scratchpad)

    return Task(
        name="addition",
        draw=draw,
        verify=equality,
        levels=tuple(range(1, 9)),
        last_level=16,
        description="sum of two numbers; the level is the number of digits",
        options={"scratchpad": scratchpad},
        scratchpad=scratchpad,
    )
