"""Calls of a user's functions, many at once, none longer than its deadline: nothing that hangs there hangs the run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple

Executor = Literal["thread", "process"]
# Seconds that a new process gets to import what it needs, before any deadline counts.
START_SECONDS = 120.0


class Returned(NamedTuple):
    """What became of a call.

    Attributes:
      value: what the function returned.
      error: why there is no value, as a predicate ("raised KeyError: ..."); None where it returned.
      late: it had not returned at its deadline.
    """

    value: Any = None
    error: str | None = None
    late: bool = False


# (name of a function, one tuple of arguments a call) -> what became of each call, in order.
Caller = Callable[[str, Sequence[tuple[Any, ...]]], list[Returned]]


@contextlib.contextmanager
def caller(
    functions: Mapping[str, Callable[..., Any]],
    *,
    executor: Executor = "thread",
    workers: int = 8,
    deadline_seconds: float = 10.0,
) -> Iterator[Caller]:
    """A caller of these functions; its processes end with the block.

    Args:
      functions: by name. For processes they and their arguments must pickle, so they are top-level functions of a
        module.
      executor: "thread" starts one thread a call: cheap, but a call that hangs cannot be ended. It is left behind, and
        holds up everything if it never releases the interpreter's lock. "process" keeps one process a worker; the
        process of a call that hangs is killed and replaced.
      workers: calls at once.
      deadline_seconds: each call may take so long, from when it begins.

    Raises:
      ValueError: for an unknown executor, no workers, no time, or functions that do not pickle.
    """
    if executor not in ("thread", "process"):
        raise ValueError(f"executor is {executor!r}; it must be 'thread' or 'process'")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers is {workers!r}; it is the number of calls at once and must be at least 1")
    if isinstance(deadline_seconds, bool) or not 0 < deadline_seconds < float("inf"):
        raise ValueError(f"deadline_seconds is {deadline_seconds!r}; it must be above 0 and finite")
    if executor == "thread":
        yield lambda name, calls: _in_threads(functions[name], calls, workers, deadline_seconds)
        return
    try:
        pickled = pickle.dumps(dict(functions))
    except Exception as error:
        raise ValueError(
            f"executor is 'process', but the functions {', '.join(functions)} cannot be sent to a process: {error}; "
            "define them at the top level of a module, or use executor 'thread'"
        ) from error
    processes: list[_Process] = []
    try:
        yield lambda name, calls: _in_processes(processes, pickled, name, calls, workers, deadline_seconds)
    finally:
        for process in processes:
            process.end()


def _in_threads(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int, deadline: float
) -> list[Returned]:
    finished: queue.SimpleQueue[tuple[int, Returned]] = queue.SimpleQueue()

    def run(number: int) -> None:
        try:
            returned = Returned(function(*calls[number]))
        except BaseException as error:
            returned = Returned(error=f"raised {_told(error)}")
        finished.put((number, returned))

    results: list[Returned] = [Returned()] * len(calls)
    waiting, since = deque(range(len(calls))), {}
    while waiting or since:
        while waiting and len(since) < workers:
            number = waiting.popleft()
            since[number] = time.monotonic()
            # A daemon: the interpreter does not wait for it at its end.
            threading.Thread(target=run, args=(number,), daemon=True).start()
        try:
            number, returned = finished.get(timeout=max(min(since.values()) + deadline - time.monotonic(), 0.0))
        except queue.Empty:
            for number in _late(since, deadline):
                results[number] = Returned(late=True)
                del since[number]
        else:
            # What comes after its deadline was given up already.
            if since.pop(number, None) is not None:
                results[number] = returned
    return results


class _Process:
    """A worker process and our end of its pipe."""

    def __init__(self, pickled: bytes) -> None:
        # Forking a process whose other threads hold locks, as JAX's do, may hang; a spawned one starts afresh.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, pickled), daemon=True)
        self.process.start()
        theirs.close()

    def require_ready(self) -> None:
        """Wait until it has imported its functions."""
        try:
            told = self.pipe.recv() if self.pipe.poll(START_SECONDS) else f"nothing within {START_SECONDS:.0f} s"
        except EOFError:
            told = f"nothing before it ended with code {self.process.exitcode}"
        if told is not True:
            self.end()
            raise ValueError(
                f"a process for the environment's functions did not start: it said {told}; import what they need at "
                "the top of their module, guard the script with if __name__ == '__main__', or use executor 'thread'"
            )

    def end(self) -> None:
        """Kill it, and what it has started."""
        with contextlib.suppress(OSError, TypeError):  # before it leads a group of its own, it alone
            os.killpg(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, pickled: bytes) -> None:
    """The life of a worker process, which leads a group of its own."""
    with contextlib.suppress(OSError):
        os.setsid()
    try:
        functions = pickle.loads(pickled)
    except BaseException as error:
        pipe.send(_told(error))
        return
    pipe.send(True)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            returned = Returned(functions[name](*arguments))
        except BaseException as error:
            returned = Returned(error=f"raised {_told(error)}")
        try:
            pipe.send(returned)
        except Exception as error:
            pipe.send(Returned(error=f"returned what does not pickle, so its process cannot send it: {_told(error)}"))


def _in_processes(
    processes: list[_Process],
    pickled: bytes,
    name: str,
    calls: Sequence[tuple[Any, ...]],
    workers: int,
    deadline: float,
) -> list[Returned]:
    missing = min(workers, len(calls)) - len(processes)
    started = [_Process(pickled) for _ in range(missing)]
    processes += started
    for process in started:
        process.require_ready()

    def replaced(number: int) -> None:
        """A new process in the place of the one that has the call."""
        process, _ = busy.pop(number)
        process.end()
        place = processes.index(process)
        processes[place] = _Process(pickled)
        processes[place].require_ready()
        idle.append(processes[place])

    results: list[Returned] = [Returned()] * len(calls)
    waiting, idle = deque(range(len(calls))), list(processes)
    busy: dict[int, tuple[_Process, float]] = {}
    while waiting or busy:
        while waiting and idle:
            number, process = waiting.popleft(), idle.pop()
            try:
                process.pipe.send((name, calls[number]))
            except Exception as error:
                results[number] = Returned(error=f"was not called, as its arguments do not pickle: {_told(error)}")
                idle.append(process)
            else:
                busy[number] = (process, time.monotonic())
        since = {number: at for number, (_, at) in busy.items()}
        by_pipe = {process.pipe: number for number, (process, _) in busy.items()}
        left = max(min(since.values(), default=0.0) + deadline - time.monotonic(), 0.0)
        ready = set(wait(list(by_pipe), timeout=left))
        for number in [number for pipe, number in by_pipe.items() if pipe in ready]:
            process = busy[number][0]
            try:
                results[number] = process.pipe.recv()
            except EOFError:
                process.process.join()
                results[number] = Returned(error=f"ended its process with code {process.process.exitcode}")
                replaced(number)
            except Exception as error:
                results[number] = Returned(error=f"returned what cannot be read: {_told(error)}")
                replaced(number)
            else:
                del busy[number]
                idle.append(process)
        for number in _late({n: at for n, (_, at) in busy.items()}, deadline):
            results[number] = Returned(late=True)
            replaced(number)
    return results


def _late(since: Mapping[int, float], deadline: float) -> list[int]:
    now = time.monotonic()
    return [number for number, at in since.items() if now - at >= deadline]


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
