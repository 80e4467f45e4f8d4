r"""Calls of functions by name: `C:47+85;3*4` -> `add(a=47, b=85)` and, on the next line, `mul(a=3, b=4)`."""

from __future__ import annotations

from random import Random

from jaxrl_llm.data.tasks.items import Item, Task, equality

FUNCTIONS = {"+": "add", "-": "sub", "*": "mul"}


def item(operations: list[tuple[int, str, int]]) -> Item:
    """The problem of calling the function of each operation on its two numbers."""
    body = ";".join(f"{a}{sign}{b}" for a, sign, b in operations)
    answer = "\n".join(f"{FUNCTIONS[sign]}(a={a}, b={b})" for a, sign, b in operations)
    return Item(f"C:{body}", "", answer, "function_calls", len(operations), f"calls-{len(operations)}")


def task() -> Task:
    """Write `level` operations on numbers below 100 as calls with named parameters, without computing them."""

    def draw(rng: Random, level: int) -> Item:
        return item([(rng.randrange(100), rng.choice("+-*"), rng.randrange(100)) for _ in range(level)])

    return Task(
        name="function_calls",
        draw=draw,
        verify=equality,
        levels=(1, 2, 3),
        last_level=8,
        description="write operations as calls of functions; the level is the number of calls",
        options={},
        scratchpad=False,
    )
