"""Synthetic tasks with exact verifiers: one module per family, found by its name.

>>> from jaxrl_llm.data import tasks
>>> tasks.task("addition", scratchpad=True).generate(level=2, count=1, seed=0)[0].task
'addition'
"""

from __future__ import annotations

import difflib
import inspect
from types import ModuleType
from typing import Any

from jaxrl_llm.bounds import shown
from jaxrl_llm.data.tasks import (
    addition,
    bargaining,
    calculator,
    chain,
    countdown,
    deduction,
    function_calls,
    grid,
    grid_moves,
    self_correction,
    sorting,
    two_chains,
)
from jaxrl_llm.data.tasks import string_functions as composition  # the file name composition.py is used in training/
from jaxrl_llm.data.tasks.items import SPLITS, Item, Segment, Task, generate, record, reference_response, split_of

__all__ = [
    "SPLITS",
    "Item",
    "Segment",
    "Task",
    "addition",
    "bargaining",
    "calculator",
    "chain",
    "composition",
    "countdown",
    "deduction",
    "function_calls",
    "generate",
    "grid",
    "grid_moves",
    "names",
    "record",
    "reference_response",
    "self_correction",
    "sorting",
    "split_of",
    "task",
    "two_chains",
]


def names() -> tuple[str, ...]:
    """Names of the task families: the modules of this package that are public and define `task`."""
    return tuple(sorted(name for name in __all__ if _is_family(globals()[name])))


def task(name: str, /, **options: Any) -> Task:
    """The task of a family with these options.

    Args:
      name: one of `names()`.
      **options: keyword parameters of the family's `task` function.

    Raises:
      ValueError: for an unknown name or option (with the nearest known one), or an invalid value of an option.
    """
    if name not in names():
        raise ValueError(f"there is no task {shown(name)}; {_nearest(name, names())}")
    family = globals()[name].task
    known = tuple(inspect.signature(family).parameters)
    for option in options:
        if option not in known:
            raise ValueError(f"task {name!r} has no option {option!r}; {_nearest(option, known)}")
    return family(**options)


def _is_family(value: Any) -> bool:
    return isinstance(value, ModuleType) and callable(getattr(value, "task", None))


def _nearest(name: str, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(choices)
