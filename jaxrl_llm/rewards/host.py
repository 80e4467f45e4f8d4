"""Calls of a user's function of text, with one-sentence errors that name the row.

A function is called once for all rows, or once per row where it names text in the singular (`completion`, `answer`); it
may be `async def`. Calls for single rows run in parallel. None and NaN mean that the function does not apply to a row.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

_ONE_ROW = frozenset({"completion", "prompt", "answer", "item"})
_THREADS = 32


class RewardError(ValueError):
    """A function of text failed, or returned an invalid value."""


def _ignored(error: BaseException) -> None:
    pass


# Exceptions that count as failures of the function; Ctrl-C belongs to the user.
_FAILURES = (Exception, SystemExit)


@dataclass(frozen=True)
class Reading:
    """A function of text and how it is called.

    Attributes:
      function: hyper-parameters are bound beforehand (`functools.partial`).
      name: its name in messages.
      deadline_s: seconds that one call may take; None waits.
      value_on_failure: value of rows whose call fails or takes too long; None raises.
      constants: arguments that are the same for all rows.
      entry: converts the entry of a row, raising ValueError for an invalid one; None accepts numbers, text and arrays
        of finite numbers. Entries of None are not converted.
      tell: called with each exception.
    """

    function: Callable[..., Any]
    name: str
    deadline_s: float | None = None
    value_on_failure: float | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    entry: Callable[[Any], Any] | None = None
    tell: Callable[[BaseException], None] = _ignored


class Answers(NamedTuple):
    """Values of a reading.

    Attributes:
      values: name -> one entry per row; None where it does not apply.
      seconds: duration of the call.
      failures: rows that got the value on failure.
    """

    values: dict[str, list[Any]]
    seconds: float
    failures: int


def answered(reading: Reading, data: Mapping[str, Any], *, rows: int, names: Sequence[str]) -> Answers:
    """Call a reading on rows.

    Args:
      reading: the function to call.
      data: its arguments, one entry per row: lists of text, arrays.
      rows: number of rows.
      names: fields that its values fill. A function of one name returns one entry per row, or {name: entries}; one of
        several returns a tuple of entries or a dictionary of them. Called for single rows, it returns those of one row.

    Raises:
      RewardError: for an exception or a late call without a value on failure, another number of values than rows, a
        value that is neither a number, nor text, nor None, or infinity.
    """
    started, failed = time.monotonic(), 0
    if rows == 0:
        return Answers({name: [] for name in names}, 0.0, 0)
    if hasattr(reading.function, "answered"):  # `Guarded`: in another process
        return reading.function.answered(reading, data, rows=rows, names=names)  # type: ignore[attr-defined]
    if called_by_row(reading.function):
        listed, failed = _row_by_row(reading, data, rows)
        columns = {name: [_part(value, name, place, names) for value in listed] for place, name in enumerate(names)}
    else:
        returned, failed = _at_once(reading, data, rows)
        columns = {name: _part(returned, name, place, names) for place, name in enumerate(names)}
    values = {name: _checked(reading, column, data, rows) for name, column in columns.items()}
    return Answers(values, time.monotonic() - started, failed)


def called_by_row(function: Callable[..., Any]) -> bool:
    """Whether a function is called for one row at a time: it names text in the singular as data."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name in _ONE_ROW for p in parameters if p.kind is not p.KEYWORD_ONLY)


def _part(returned: Any, name: str, place: int, names: Sequence[str]) -> Any:
    """The part of a function's return value that belongs to one name."""
    if isinstance(returned, Mapping):  # a mapping without any of the names is rejected later
        return returned.get(name) if returned.keys() & set(names) else returned
    if len(names) == 1 or returned is None:
        return returned
    try:
        return returned[place]
    except (TypeError, IndexError):
        return returned


def _call(reading: Reading, data: Mapping[str, Any]) -> Any:
    """One call, within its deadline."""
    arguments = {**data, **reading.constants}

    def called() -> Any:
        returned = reading.function(**arguments)
        if inspect.isawaitable(returned):
            return asyncio.run(_awaited(returned, reading.deadline_s))
        return returned

    if reading.deadline_s is None:
        return called()
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(called).result(timeout=reading.deadline_s)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


async def _awaited(value: Any, deadline: float | None) -> Any:
    return await asyncio.wait_for(value, deadline)


def _at_once(reading: Reading, data: Mapping[str, Any], rows: int) -> tuple[Any, int]:
    try:
        return _call(reading, data), 0
    except _FAILURES as error:
        reading.tell(error)
        if reading.value_on_failure is not None:
            if rows == 1 or isinstance(error, (Late, TimeoutError)):
                return [reading.value_on_failure] * rows, rows
            parts = [_at_once(reading, _row(data, row, rows), 1) for row in range(rows)]
            return [part[0] for part, _ in parts], sum(count for _, count in parts)
        row = None if isinstance(error, (Late, TimeoutError)) else _failing_row(reading, data, rows)
        raise _told(reading, error, data, row) from error


def _row_by_row(reading: Reading, data: Mapping[str, Any], rows: int) -> tuple[list[Any], int]:
    """Values of all rows, called in parallel, and how many failed."""

    def one(row: int) -> Any:
        return {name: value[row] for name, value in data.items()}

    results: list[Any] = [None] * rows
    errors: dict[int, BaseException] = {}
    if inspect.iscoroutinefunction(getattr(reading.function, "func", reading.function)):

        async def all_rows() -> list[Any]:
            calls = [
                _awaited(reading.function(**one(row), **reading.constants), reading.deadline_s) for row in range(rows)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

        for row, value in enumerate(asyncio.run(all_rows())):
            if isinstance(value, BaseException):
                errors[row] = value
                reading.tell(value)
            else:
                results[row] = value
    else:
        pool = ThreadPoolExecutor(min(_THREADS, rows))
        try:
            futures = [pool.submit(reading.function, **one(row), **reading.constants) for row in range(rows)]
            for row, future in enumerate(futures):
                try:
                    results[row] = future.result(timeout=reading.deadline_s)
                except _FAILURES as error:
                    errors[row] = error
                    reading.tell(error)
                    if reading.value_on_failure is None:
                        break  # skip the remaining rows
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for row, error in errors.items():
        if reading.value_on_failure is None:
            raise _told(reading, error, _listed_text(data), row) from error
        results[row] = reading.value_on_failure
    return results, len(errors)


def _listed_text(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"completions": data["completion"]} if "completion" in data else dict(data)


def _told(reading: Reading, error: BaseException, data: Mapping[str, Any], row: int | None) -> RewardError:
    where = "on the batch as a whole (no row fails alone)" if row is None else f"at row {row}{_shown(data, row)}"
    if isinstance(error, (Late, TimeoutError)):
        return RewardError(
            f"reward {reading.name!r} took longer than its deadline of {reading.deadline_s} s {where}; raise "
            "deadline_s, or give value_on_failure to go on"
        )
    remedy = "give value_on_failure, the value of such completions, to go on"
    if not _shipped(reading.function):
        remedy = (
            "catch the case in the function and return the reward that such a completion should get, or "
            "give value_on_failure to go on"
        )
    return RewardError(f"reward {reading.name!r} raised {type(error).__name__}: {error} {where}; {remedy}")


def _shipped(function: Any) -> bool:
    """Whether a function is one of the library, which its user does not edit."""
    while (inner := getattr(function, "func", None) or getattr(function, "__wrapped__", None)) is not None:
        function = inner
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.startswith("jaxrl_llm.")


def _checked(reading: Reading, returned: Any, data: Mapping[str, Any], rows: int) -> list[Any]:
    """One entry per row: a number, text, an array, or None; or the result of `entry`."""
    values, called = _listed(returned), reading.name
    if values is None or len(values) != rows:
        what = f"a {type(returned).__name__}" if values is None else f"{len(values)} values"
        raise RewardError(
            f"reward {called!r} returned {what} for {rows} rows; it must return a list or an array of {rows} floats, "
            "one for each completion in order"
        )
    if reading.entry is None:
        return [_value(value, called, row, data) for row, value in enumerate(values)]
    made = []
    for row, value in enumerate(values):
        try:
            made.append(None if value is None else reading.entry(value))
        except ValueError as error:
            raise RewardError(f"{called!r} at row {row}{_shown(_listed_text(data), row)}: {error}") from None
    return made


def _value(value: Any, called: str, row: int, data: Mapping[str, Any]) -> Any:
    if value is None or isinstance(value, str):
        return value
    try:
        if isinstance(value, bytes):
            raise TypeError
        # A number that is too large for float32 becomes infinity, which is reported like any other.
        with np.errstate(over="ignore"):
            number = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(
            f"reward {called!r} returned {value!r} at row {row}{_shown(_listed_text(data), row)}; it must return one "
            "number for each row, or None where it does not apply"
        ) from None
    if np.isinf(number).any():
        raise RewardError(
            f"reward {called!r} returned {value!r} at row {row}{_shown(_listed_text(data), row)}; a reward must be "
            "finite in float32, so return a number such as 0.0, or None where it does not apply"
        )
    return None if number.ndim == 0 and np.isnan(number) else number if number.ndim else np.float32(number)


def checked_host_reward(
    function: Callable[..., Any], data: Mapping[str, Any], *, rows: int | None = None, name: str | None = None
) -> np.ndarray:
    """Call `function(**data)` and return its B rewards as float32, or raise an error that describes the problem.

    Args:
      function: returns one number per row, None or NaN where it does not apply; hyper-parameters are bound beforehand.
      data: arguments of the function, such as completions, prompts, answers and items, one entry per row.
      rows: number of rows B; None takes the length of the first entry of `data`.
      name: name of the function in messages; None takes its own.

    Returns:
      One reward per row, [B] float32; NaN where it does not apply.

    Raises:
      RewardError: for an exception in the function, another number of values than rows, a value that is no number, or
        infinity.

    >>> checked_host_reward(lambda completions: [len(text) for text in completions], {"completions": ["a", "bc"]})
    array([1., 2.], dtype=float32)
    """
    called = name or _name(function)
    count = len(next(iter(data.values()))) if rows is None else rows
    (values,) = answered(Reading(function, called), data, rows=count, names=["rewards"]).values.values()
    for row, value in enumerate(values):
        if isinstance(value, str) or np.ndim(value) != 0:
            said = value.tolist() if isinstance(value, np.ndarray) else value
            raise RewardError(
                f"reward {called!r} returned {said!r} at row {row}{_shown(data, row)}; it must return one number for "
                "each row, so replace text and lists by a float"
            )
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _listed(returned: Any) -> list[Any] | None:
    if isinstance(returned, (str, bytes, Mapping)):
        return None
    try:
        return list(returned)
    except TypeError:
        return None


def _row(data: Mapping[str, Any], row: int, count: int) -> dict[str, Any]:
    return {key: value[row : row + 1] if by_row(value, count) else value for key, value in data.items()}


def _failing_row(reading: Reading, data: Mapping[str, Any], count: int) -> int | None:
    """The first row that fails on its own; the run ends here, so the cost of repeated calls does not matter."""
    for row in range(count):
        try:
            _call(reading, _row(data, row, count))
        except _FAILURES:
            return row
    return None


def by_row(value: Any, count: int) -> bool:
    """Whether an argument has one entry per row."""
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes)) and len(value) == count


def _shown(data: Mapping[str, Any], row: int) -> str:
    """The row's completion, cut to a readable length."""
    completions = data.get("completions")
    if completions is None or not by_row(completions, len(completions)):
        return ""
    return f" (completion {str(completions[row])[:80]!r})"


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
