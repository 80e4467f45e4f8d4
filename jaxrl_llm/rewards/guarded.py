"""A user's function of text in a separate process, so that its failures do not end the run.

`sys.exit`, a crash, a hang, memory without bound and floods of output are failures of the rows of that call, like an
exception. The process and its child processes are killed together.
"""

from __future__ import annotations

import functools
import inspect
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxrl_llm.rewards.host import Answers, Reading, RewardError, answered, by_row, called_by_row
from jaxrl_llm.sandbox import Returned, Workers
from jaxrl_llm.sandbox.workers import BARE

DEADLINE_SECONDS = 300.0  # of a call without a deadline of its own
_RESTARTS = 16  # restarts per call, to find the rows that end the process
_AT_ONCE = 32  # calls for single rows in parallel


class FunctionEnded(Exception):
    """A function tried to end the process that it runs in."""


@dataclass(eq=False)
class Guarded:
    """A function that `rewards.host.answered` calls in another process; its signature is that of the function.

    Attributes:
      function: a top-level function of a module, since it and its bound arguments are pickled.
      name: for messages and files.
      memory_bytes: memory limit of its process and child processes together; None takes half of the free memory.
      most_failed: largest share of the rows of a call that may fail; above it the call is an error.
      folder: folder of NAME.log with its output and tracebacks; None drops them.
      stop: called while waiting; raises to abort the wait.
      isolated: no access to files, network and environment, for functions that run generated code.
      place: where `folder` can be read after the run, if not there.
    """

    function: Callable[..., Any]
    name: str
    memory_bytes: int | None = None
    most_failed: float = 1.0
    folder: Path | None = None
    stop: Callable[[], None] = lambda: None
    isolated: bool = False
    place: str | None = None
    _workers: Workers | None = field(default=None, init=False)

    def __post_init__(self):
        functools.update_wrapper(self, self.function, updated=())
        self.__signature__ = inspect.signature(self.function)
        self.__name__, self._reads_on_host = self.name, True
        Workers({self.name: self.function})  # raises if the function does not pickle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, in this process."""
        return self.function(*args, **kwargs)

    def answered(self, reading: Reading, data: Mapping[str, Any], *, rows: int, names: Sequence[str]) -> Answers:
        """As `rewards.host.answered`.

        Raises:
          RewardError: as there, and where the process ended or was killed, without a value on failure.
        """
        started = time.monotonic()
        if reading.entry is not None:  # of a view, which needs objects of the run
            return answered(replace(reading, function=self.function), data, rows=rows, names=names)
        asked = replace(reading, function=self.function, deadline_s=reading.deadline_s or DEADLINE_SECONDS)
        answers = self._answered(asked, dict(data), rows, tuple(names), [_RESTARTS])
        if answers.failures > self.most_failed * rows:
            raise RewardError(
                f"reward {reading.name!r} failed for {answers.failures} of {rows} rows, more than the share of "
                f"{self.most_failed:g} that faults.most_failed_share allows{self._log()}"
            )
        return answers._replace(seconds=time.monotonic() - started)

    def _answered(
        self, reading: Reading, data: dict[str, Any], rows: int, names: tuple[str, ...], restarts: list[int]
    ) -> Answers:
        found = self._asked(reading, data, rows, names)
        if found.error is None and not found.late:
            kind, answer = found.value
            if kind == "late":  # threads of late rows may hang for ever
                self.close()
            if kind == "error":
                raise RewardError(f"{answer}{self._log()}")
            return answer
        restarts[0] -= 1
        if reading.value_on_failure is None:
            late = f"took longer than its deadline of {reading.deadline_s:g} s; raise deadline_s, or give "
            told = found.error or f"{late}value_on_failure to go on"
            raise RewardError(f"reward {reading.name!r} {told}{self._log()}")
        if rows > 1 and found.crashed and restarts[0] > 0:  # bisect to find the failing rows
            half = rows // 2
            parts = [
                self._answered(reading, _rows(data, rows, part), part.stop - part.start, names, restarts)
                for part in (slice(0, half), slice(half, rows))
            ]
            both = {name: [*parts[0].values[name], *parts[1].values[name]] for name in names}
            return Answers(both, 0.0, parts[0].failures + parts[1].failures)
        return Answers({name: [reading.value_on_failure] * rows for name in names}, 0.0, rows)

    def _asked(self, reading: Reading, data: dict[str, Any], rows: int, names: tuple[str, ...]) -> Returned:
        if self._workers is None:
            log = None if self.folder is None else self.folder / f"{self.name}.log"
            asked = {self.name: functools.partial(_guarded, self.function)}
            bare = BARE if self.isolated else None
            self._workers = Workers(asked, 1, self.memory_bytes, log, self.stop, bare, self.isolated)
        by_row = called_by_row(reading.function)
        assert reading.deadline_s is not None
        # The deadline of a call for all rows is enforced here, that of single rows inside the process.
        bound = reading.deadline_s * (-(-rows // _AT_ONCE)) + 5.0 if by_row else reading.deadline_s
        told = replace(reading, function=None, tell=None, deadline_s=reading.deadline_s if by_row else None)
        try:
            (found,) = self._workers(self.name, [(told, data, rows, names)], bound)
        except ValueError as error:  # the process does not start
            raise RewardError(f"reward {reading.name!r}: {error}{self._log()}") from None
        return found

    def _log(self) -> str:
        where = f"{self.place or self.folder}/{self.name}.log"
        return "" if self.folder is None else f"; its traceback and output are in {where}"

    def close(self) -> None:
        """End its process and the child processes."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __reduce__(self) -> Any:
        given = self.function, self.name, self.memory_bytes, self.most_failed, self.folder
        return functools.partial(Guarded, isolated=self.isolated), given


def _rows(data: Mapping[str, Any], count: int, part: slice) -> dict[str, Any]:
    return {key: value[part] if by_row(value, count) else value for key, value in data.items()}


# ---- in the other process -------------------------------------------------------------------------------------------


def _guarded(
    function: Callable[..., Any], reading: Reading, data: dict[str, Any], rows: int, names: tuple[str, ...]
) -> tuple[str, Any]:
    """("values" or "late", answers), or ("error", message)."""
    late = [0]

    def tell(error: BaseException) -> None:
        late[0] += isinstance(error, TimeoutError)
        traceback.print_exception(error)

    told = replace(reading, function=_staying(function), tell=tell)
    try:
        answers = answered(told, data, rows=rows, names=names)
    except RewardError as error:
        return "error", str(error)
    return "late" if late[0] else "values", answers


def _staying(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with attempts to end the process turned into `FunctionEnded`."""
    ending = (SystemExit, KeyboardInterrupt, GeneratorExit)

    @functools.wraps(function)
    def stays(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ending as error:
            raise FunctionEnded(f"{type(error).__name__}({error})") from error

    @functools.wraps(function)
    async def stays_awaited(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except ending as error:
            raise FunctionEnded(f"{type(error).__name__}({error})") from error

    return stays_awaited if inspect.iscoroutinefunction(getattr(function, "func", function)) else stays
