"""Calling a user's reward function: what goes wrong in it is said in one sentence that names the row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class RewardError(ValueError):
    """A reward function failed, or returned something that is no reward."""


def checked_host_reward(
    function: Callable[..., Any], data: Mapping[str, Any], *, rows: int | None = None, name: str | None = None
) -> np.ndarray:
    """Call `function(**data)` and return its B rewards as float32, or say what is wrong with them.

    Args:
      function: returns one finite number a row; hyper-parameters are bound beforehand (`functools.partial`).
      data: what the function names, such as completions, prompts, answers and items, one entry a row.
      rows: number of rows B; None takes the length of the first entry of `data`.
      name: what messages call the function; None takes its own name.

    Returns:
      One reward a row, [B] float32.

    Raises:
      RewardError: for an exception in the function, another number of values than rows, a value that is no number, NaN
        or infinity.

    >>> checked_host_reward(lambda completions: [len(text) for text in completions], {"completions": ["a", "bc"]})
    array([1., 2.], dtype=float32)
    """
    called = name or _name(function)
    count = len(next(iter(data.values()))) if rows is None else rows
    try:
        returned = function(**data)
    except Exception as error:
        row = _failing_row(function, data, count)
        where = "on the batch as a whole (no row fails alone)" if row is None else f"at row {row}{_shown(data, row)}"
        raise RewardError(
            f"reward {called!r} raised {type(error).__name__}: {error} {where}; catch the case in the function and "
            "return the reward that such a completion should get"
        ) from error
    values = _listed(returned)
    if values is None or len(values) != count:
        what = f"a {type(returned).__name__}" if values is None else f"{len(values)} values"
        raise RewardError(
            f"reward {called!r} returned {what} for {count} rows; it must return a list or an array of {count} floats, "
            "one for each completion in order"
        )
    rewards = np.zeros(count, np.float32)
    for row, value in enumerate(values):
        rewards[row] = _number(value, called, row, data)
    return rewards


def _number(value: Any, called: str, row: int, data: Mapping[str, Any]) -> np.float32:
    try:
        if isinstance(value, (str, bytes)) or np.ndim(value) != 0:
            raise TypeError
        # A number that is too large for float32 becomes infinity, which is reported like any other.
        with np.errstate(over="ignore"):
            number = np.float32(value)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(
            f"reward {called!r} returned {value!r} at row {row}{_shown(data, row)}; it must return one number for each "
            "row, so replace None, text and lists by a float"
        ) from None
    if not np.isfinite(number):
        raise RewardError(
            f"reward {called!r} returned {value!r} at row {row}{_shown(data, row)}; a reward must be finite in "
            "float32, so return a number such as 0.0 where there is none"
        )
    return number


def _listed(returned: Any) -> list[Any] | None:
    if isinstance(returned, (str, bytes, Mapping)):
        return None
    try:
        return list(returned)
    except TypeError:
        return None


def _failing_row(function: Callable[..., Any], data: Mapping[str, Any], count: int) -> int | None:
    """The first row that fails on its own; the run ends here, so calling again costs little and tells much."""
    for row in range(count):
        try:
            function(**{key: value[row : row + 1] if _by_row(value, count) else value for key, value in data.items()})
        except Exception:
            return row
    return None


def _by_row(value: Any, count: int) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes)) and len(value) == count


def _shown(data: Mapping[str, Any], row: int) -> str:
    """The row's completion, cut to a readable length."""
    completions = data.get("completions")
    if completions is None or not _by_row(completions, len(completions)):
        return ""
    return f" (completion {str(completions[row])[:80]!r})"


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
