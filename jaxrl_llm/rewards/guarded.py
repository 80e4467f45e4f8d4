"""A user's function of text in a process of its own, so that whatever it does ends there, and not the run.

`sys.exit`, a crash, a hang, memory without bound and floods of output are failures of the rows that it was called for,
like an exception. The process and all that it has started are killed as a group.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import psutil

from jaxrl_llm.rewards.host import Answers, Reading, RewardError, answered, by_row, called_by_row

DEADLINE_SECONDS = 300.0  # of a call of a function that names no deadline
START_SECONDS = 120.0  # in which a process imports what it needs
MOST_OUTPUT = 16 << 20  # bytes that a function's output may take on the disk
_RESTARTS = 16  # that rows are looked for which end their process, in one call
_LOOKS_SECONDS = 0.1  # between two looks at memory and output


class _Ended(Exception):
    """The process of a function had to be ended, or has ended itself."""


class FunctionEnded(Exception):
    """A function asked for the end of the process that it runs in."""


@dataclass(eq=False)
class Guarded:
    """A function that is called in another process; `rewards.host.answered` does so, and `signature` reads it as it is.

    Attributes:
      function: it and what is bound to it pickle, so it is a top-level function of a module.
      name: for messages and files.
      memory_bytes: that its process and those that it starts may use together; None takes half of what is free.
      most_failed: share of the rows of a call that may get the value on failure; beyond it the call is an error.
      folder: where its output and its tracebacks are written, in NAME.log; None drops them.
      stop: raises what the run wants to end with instead of waiting for an answer.
    """

    function: Callable[..., Any]
    name: str
    memory_bytes: int | None = None
    most_failed: float = 1.0
    folder: Path | None = None
    stop: Callable[[], None] = lambda: None
    _process: _Process | None = field(default=None, init=False)

    def __post_init__(self):
        functools.update_wrapper(self, self.function, updated=())
        self.__signature__ = inspect.signature(self.function)
        self.__name__, self._reads_on_host = self.name, True
        if getattr(getattr(self.function, "func", self.function), "__module__", "") == "__main__":
            raise ValueError(f"{self.name} is defined in the main script; define it in a module of its own")
        pickle.dumps(self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, in this process."""
        return self.function(*args, **kwargs)

    def answered(self, reading: Reading, data: Mapping[str, Any], *, rows: int, names: Sequence[str]) -> Answers:
        """As `rewards.host.answered`.

        Raises:
          RewardError: as there, and where the process ended or had to be ended, without a value on failure.
        """
        started = time.monotonic()
        if reading.entry is not None:  # of a view, which is made with what the run holds
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
        try:
            return self._asked(reading, data, rows, names)
        except _Ended as error:
            restarts[0] -= 1
            if reading.value_on_failure is None:
                raise RewardError(f"reward {reading.name!r} {error}{self._log()}") from None
            if rows > 1 and error.args[1:] == ("crash",) and restarts[0] > 0:  # which of the rows was it?
                half = rows // 2
                parts = [
                    self._answered(reading, _rows(data, rows, part), part.stop - part.start, names, restarts)
                    for part in (slice(0, half), slice(half, rows))
                ]
                both = {name: [*parts[0].values[name], *parts[1].values[name]] for name in names}
                return Answers(both, 0.0, parts[0].failures + parts[1].failures)
            return Answers({name: [reading.value_on_failure] * rows for name in names}, 0.0, rows)

    def _asked(self, reading: Reading, data: dict[str, Any], rows: int, names: tuple[str, ...]) -> Answers:
        process = self._process = self._process or _Process(self)
        by_row = called_by_row(reading.function)
        assert reading.deadline_s is not None
        # A call for all rows is ended here; of calls for single rows the process itself knows which are late.
        bound = reading.deadline_s * (-(-rows // _AT_ONCE)) + 5.0 if by_row else reading.deadline_s
        told = reading if by_row else replace(reading, deadline_s=None)
        try:
            kind, answer = process.ask((told, data, rows, names), bound, reading.deadline_s, self.stop)
        except BaseException:
            self.close()
            raise
        if kind == "late":  # rows were given up, whose threads may hang for ever
            self.close()
        if kind == "error":
            raise RewardError(f"{answer}{self._log()}")
        return answer

    def _log(self) -> str:
        return "" if self.folder is None else f"; its traceback and output are in {self.folder / self.name}.log"

    def close(self) -> None:
        """End its process and whatever that has started."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def __reduce__(self) -> Any:
        return Guarded, (self.function, self.name, self.memory_bytes, self.most_failed, self.folder)


_AT_ONCE = 32  # calls for single rows
_MAIN = threading.main_thread()


def _rows(data: Mapping[str, Any], count: int, part: slice) -> dict[str, Any]:
    return {key: value[part] if by_row(value, count) else value for key, value in data.items()}


class _Process:
    """A process that serves one function, and our end of its socket."""

    def __init__(self, guarded: Guarded):
        self.log: IO[bytes] | None = None
        if guarded.folder is not None:
            with contextlib.suppress(OSError):  # a full disk is noticed by whoever writes the run
                guarded.folder.mkdir(parents=True, exist_ok=True)
                self.log = open(guarded.folder / f"{guarded.name}.log", "ab", buffering=0)  # noqa: SIM115
        self.memory = guarded.memory_bytes or psutil.virtual_memory().available // 2
        ours, theirs = socket.socketpair()
        output = subprocess.DEVNULL if self.log is None else self.log
        code = f"import sys; sys.path[:] = {sys.path!r}; from jaxrl_llm.rewards.guarded import serve; "
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}serve({theirs.fileno()}, {threading.current_thread() is _MAIN})"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            # The devices are the run's.
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        )
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.pipe.send_bytes(pickle.dumps(guarded.function))
        self._receive(START_SECONDS, f"did not start within {START_SECONDS:g} s", lambda: None)

    def ask(self, request: Any, bound: float, deadline: float, stop: Callable[[], None]) -> tuple[str, Any]:
        """What it answers.

        Raises:
          _Ended: where it does not.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # it ended: said below
            self.pipe.send_bytes(pickle.dumps(request))
        late = f"took longer than its deadline of {deadline:g} s; raise deadline_s, or give value_on_failure to go on"
        return self._receive(bound, late, stop)

    def _receive(self, bound: float, late: str, stop: Callable[[], None]) -> tuple[str, Any]:
        until, looks = time.monotonic() + bound, 0
        try:
            while not self.pipe.poll(_LOOKS_SECONDS):
                stop()
                if time.monotonic() > until:
                    raise _Ended(late)
                looks += 1
                if (used := _memory_of(self.process.pid, whole=looks % 10 == 0)) > self.memory:
                    raise _Ended(
                        f"used {used / 2**30:.1f} GiB of memory, of which it may have {self.memory / 2**30:.1f}"
                    )
                self._cut_output()
            self._cut_output()
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise _Ended(f"ended its process, which {how}", "crash") from None

    def _cut_output(self) -> None:
        if self.log is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self.log.fileno()).st_size > MOST_OUTPUT:
                    os.ftruncate(self.log.fileno(), 0)
                    self.log.write(f"(the first {MOST_OUTPUT >> 20} MiB of output were dropped)\n".encode())

    def end(self) -> None:
        """Kill it and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()
        if self.log is not None:
            self.log.close()


def _memory_of(leader: int, *, whole: bool) -> int:
    """Bytes of memory of a process, or of all processes of its session, which takes longer to see."""
    total = 0
    with contextlib.suppress(psutil.Error):
        total = psutil.Process(leader).memory_info().rss
    for process in psutil.process_iter() if whole else ():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != leader and os.getsid(process.pid) == leader:
                total += process.memory_info().rss
    return total


# ---- the other process ----------------------------------------------------------------------------------------------


def serve(file: int, of_main_thread: bool) -> None:
    """The life of the process: requests in, answers out, until the socket closes."""
    if of_main_thread:  # Linux would end it with the thread that has started it
        _die_with_parent()
    pipe = Connection(file)
    function = pickle.loads(pipe.recv_bytes())
    pipe.send_bytes(pickle.dumps(("ready", None)))
    late = [0]

    def tell(error: BaseException) -> None:
        late[0] += isinstance(error, TimeoutError)
        traceback.print_exception(error)

    while True:
        try:
            reading, data, rows, names = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        late[0] = 0
        told = replace(reading, function=_staying(function), tell=tell)
        try:
            answer: tuple[str, Any] = ("values", answered(told, data, rows=rows, names=names))
            answer = ("late" if late[0] else "values", answer[1])
        except RewardError as error:
            answer = ("error", str(error))
        pipe.send_bytes(pickle.dumps(answer))


def _die_with_parent() -> None:
    """Linux kills this process when its parent is gone, whatever it is doing."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _staying(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which a wish to end the process is an exception like any other."""
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
