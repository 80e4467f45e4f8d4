"""Sorting and reversal: `S:5 3 9 1` -> `1 3 5 9`, `R:5 3 9 1` -> `1 9 3 5`."""

from __future__ import annotations

from random import Random

from jaxrl_llm.data.tasks.items import Item, Task, equality, require_bool, require_choice


def _spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def selections(numbers: list[int]) -> list[str]:
    """Steps of a selection sort.

    >>> selections([5, 3, 9])
    ['min 3 from 5 3 9', 'min 5 from 5 9', 'min 9 from 9']
    """
    left, written = list(numbers), []
    while left:
        written.append(f"min {min(left)} from {_spaced(left)}")
        left.remove(min(left))
    return written


def item(numbers: list[int], *, operation: str = "sort", scratchpad: bool = False) -> Item:
    """The problem of sorting a list in ascending order, or of reversing it."""
    letter, answer = ("S", sorted(numbers)) if operation == "sort" else ("R", numbers[::-1])
    think = ";".join(selections(numbers)) if scratchpad else ""
    level = len(numbers)
    return Item(f"{letter}:{_spaced(numbers)}", think, _spaced(answer), "sorting", level, f"{operation}-{level}")


def task(*, operation: str = "sort", scratchpad: bool = False) -> Task:
    """Lists of `level` integers from 0 to 99, duplicates allowed.

    Args:
      operation: "sort" (ascending) or "reverse" (the order of the list).
      scratchpad: write the steps of a selection sort before the answer; only sorting has them.
    """
    require_choice("operation", operation, ("sort", "reverse"))
    if require_bool("scratchpad", scratchpad) and operation == "reverse":
        raise ValueError('scratchpad is true but operation is "reverse", which has no scratch; set scratchpad to false')

    def draw(rng: Random, level: int) -> Item:
        return item([rng.randrange(100) for _ in range(level)], operation=operation, scratchpad=scratchpad)

    return Task(
        name="sorting",
        draw=draw,
        verify=equality,
        levels=tuple(range(3, 13)),
        last_level=24,
        description=f"{operation} a list of integers; the level is their number",
        options={"operation": operation, "scratchpad": scratchpad},
        scratchpad=scratchpad,
    )
