"""Parallel calls of users' functions with deadlines, so that a hanging function does not block the run."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.sandbox import Returned, Workers
from jaxrl_llm.sandbox.workers import BARE, MOST_OUTPUT

Executor = Literal["thread", "process", "sandbox"]

# (name of a function, one tuple of arguments per call) -> the outcome of each call, in order.
Caller = Callable[[str, Sequence[tuple[Any, ...]]], list[Returned]]

_LOGGING = threading.Lock()


@contextlib.contextmanager
def caller(
    functions: Mapping[str, Callable[..., Any]],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    deadline_seconds: float = 10.0,
    log: Path | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Caller]:
    """A context with a caller of these functions; its processes end with the context.

    Args:
      functions: by name. For processes, they and their arguments must be picklable, so they must be top-level functions
        of a module.
      executor: "thread" starts one thread per call: cheap, but a hanging call cannot be ended; it is abandoned, and
        blocks everything if it never releases the interpreter lock. "process" keeps one process per worker; the process
        of a hanging call is killed with its children and replaced. "sandbox": such processes without files, network and
        environment variables, which return plain data. None is "thread".
      workers: number of simultaneous calls; None: 8 threads, or one process per core, at most 8.
      deadline_seconds: longest duration of each call, from its start.
      log: file of the tracebacks, and of the output of processes; None drops them.
      stop: called while waiting for a process; an exception in it ends the calls.

    Raises:
      ValueError: for an unknown executor, no workers, no time, or functions that cannot be pickled.
    """
    if executor not in (None, "thread", "process", "sandbox"):
        raise ValueError(f"executor is {executor!r}; it must be 'thread', 'process' or 'sandbox'")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers is {workers!r}; it is the number of calls at once and must be at least 1")
    if isinstance(deadline_seconds, bool) or not 0 < deadline_seconds < float("inf"):
        raise ValueError(f"deadline_seconds is {deadline_seconds!r}; it must be above 0 and finite")
    if executor in (None, "thread"):
        yield lambda name, calls: _in_threads(functions[name], calls, workers or 8, deadline_seconds, log)
        return
    isolated = executor == "sandbox"
    try:
        processes = Workers(
            functions,
            workers or min(8, os.cpu_count() or 1),
            isolated=isolated,
            environment=BARE if isolated else None,
            log=log,
            stop=stop,
        )
    except ValueError as error:
        raise ValueError(
            f"executor is {executor!r}, but {error}; define them at the top level of a module, or use executor 'thread'"
        ) from error
    try:
        yield lambda name, calls: processes(name, calls, deadline_seconds)
    finally:
        processes.close()


def can_be_sent(functions: Mapping[str, Callable[..., Any]]) -> bool:
    """Whether these functions can be called in other processes."""
    try:
        Workers(functions)
    except ValueError:
        return False
    return True


def _in_threads(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    workers: int,
    deadline: float,
    log: Path | None,
) -> list[Returned]:
    finished: queue.SimpleQueue[tuple[int, Returned]] = queue.SimpleQueue()

    def run(number: int) -> None:
        try:
            returned = Returned(function(*calls[number]))
        except BaseException as error:
            _logged(log, error)
            returned = Returned(error=f"raised {_told(error)}")
        finished.put((number, returned))

    results: list[Returned] = [Returned()] * len(calls)
    waiting, since = deque(range(len(calls))), {}
    while waiting or since:
        while waiting and len(since) < workers:
            number = waiting.popleft()
            since[number] = time.monotonic()
            # A daemon thread: the interpreter does not wait for it at exit.
            threading.Thread(target=run, args=(number,), daemon=True).start()
        try:
            number, returned = finished.get(timeout=max(min(since.values()) + deadline - time.monotonic(), 0.0))
        except queue.Empty:
            for number in _late(since, deadline):
                results[number] = Returned(late=True)
                del since[number]
        else:
            # Results after the deadline are ignored.
            if since.pop(number, None) is not None:
                results[number] = returned
    return results


def _late(since: Mapping[int, float], deadline: float) -> list[int]:
    now = time.monotonic()
    return [number for number, at in since.items() if now - at >= deadline]


def _logged(log: Path | None, error: BaseException) -> None:
    """Append the traceback of an error to the log; once that is as large as logs of processes may be, none is added."""
    if log is None:
        return
    with _LOGGING, contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        if not log.exists() or log.stat().st_size < MOST_OUTPUT:
            with log.open("a") as file:
                traceback.print_exception(error, file=file)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
