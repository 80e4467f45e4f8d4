"""The one way in which functions are called in other processes: with deadlines and limits, and killed as a group.

Each process leads a session of its own, and what it starts stays below it in the tree of processes, daemons included;
so nothing outlives it. Requests and answers go through a socket; an isolated process answers in plain data only, as
what it sends must not run code here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from jaxrl_llm.sandbox.isolation import (
    FOLDER,
    Limits,
    SandboxError,
    adopt_orphans,
    die_with_parent,
    entered,
    facilities,
    missing,
)

START_SECONDS = 120.0  # in which a process imports what it needs, before any deadline counts
END_SECONDS = 5.0  # in which a process ends that has closed its connection
MOST_OUTPUT = 16 << 20  # bytes that output may take on the disk
MOST_ANSWER = 256 << 20  # bytes of one answer of an isolated process
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}
# What code that a model wrote may see of the environment.
BARE = UNBUFFERED | {"PATH": os.defpath, "HOME": FOLDER, "TMPDIR": FOLDER, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
BARE |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {"JAX_PLATFORMS": "cpu"}
_LOOK_SECONDS = 0.1  # between two looks at memory and output
_STALL_SECONDS = 60  # that a process may stop in the middle of an answer
_MAIN = threading.main_thread()
# What an isolated process may answer with, beside plain data.
_PLAIN = {
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("jaxrl_llm.rewards.host", "Answers"),
}


class Returned(NamedTuple):
    """What became of a call.

    Attributes:
      value: what the function returned.
      error: why there is no value, as a predicate ("raised KeyError: ..."); None where it returned.
      late: it had not returned at its deadline.
      ended: the process of the call is no more.
      crashed: it ended by itself.
    """

    value: Any = None
    error: str | None = None
    late: bool = False
    ended: bool = False
    crashed: bool = False


@dataclass(eq=False)
class Workers:
    """Processes that call functions; they start when they are needed first, and end with `close` or with this process.

    Attributes:
      functions: by name. They pickle, as top-level functions of a module do, or are given as "module:function", which
        is imported in the other process alone.
      workers: calls at once, each in a process.
      memory_bytes: that a process and those that it starts may use together; None takes half of what is free.
      log: file that their output and tracebacks are appended to; None drops them.
      stop: raises what the caller wants to end with instead of waiting for an answer.
      environment: its variables; None takes those of this process, but leaves the devices to it.
      isolated: the processes give up files, network and all other processes once they have imported their functions.
        An answer is plain data then: numbers, text, arrays, lists, dictionaries.

    Raises:
      ValueError: for functions that cannot be sent to another process.
    """

    functions: Mapping[str, Callable[..., Any] | str]
    workers: int = 1
    memory_bytes: int | None = None
    log: Path | None = None
    stop: Callable[[], None] = lambda: None
    environment: Mapping[str, str] | None = None
    isolated: bool = False
    _processes: list[_Process] = field(default_factory=list, init=False, repr=False)
    _one_at_a_time: Any = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self):
        for name, function in self.functions.items():
            if getattr(getattr(function, "func", function), "__module__", "") == "__main__":
                raise ValueError(f"{name} is defined in the main script; define it in a module of its own")
        try:
            self._pickled = pickle.dumps(dict(self.functions))
        except Exception as error:
            raise ValueError(f"{', '.join(self.functions)} cannot be sent to a process: {error}") from error

    def __call__(self, name: str, calls: Sequence[tuple[Any, ...]], seconds: float) -> list[Returned]:
        """What becomes of each call, in order.

        Args:
          name: of the function.
          calls: its arguments.
          seconds: that each may take from when it begins; the process of one that takes longer is killed.

        Raises:
          ValueError: where a process does not start.
        """
        with self._one_at_a_time:
            try:
                return self._called(name, calls, seconds)
            except BaseException:  # whose answer would be taken for that of the next call
                self.close()
                raise

    def _called(self, name: str, calls: Sequence[tuple[Any, ...]], seconds: float) -> list[Returned]:
        results: list[Returned] = [Returned()] * len(calls)
        waiting, busy = deque(range(len(calls))), dict[Connection, tuple[_Process, int, float]]()
        idle = self._ready(min(self.workers, len(calls)))
        while waiting or busy:
            idle += self._ready(min(len(waiting) - len(idle), self.workers - len(busy) - len(idle)), anew=True)
            while waiting and idle:
                number, process = waiting.popleft(), idle.pop()
                try:
                    request = pickle.dumps((name, calls[number]))
                except Exception as error:
                    results[number] = Returned(error=f"was not called, as its arguments do not pickle: {_told(error)}")
                    idle.append(process)
                    continue
                with contextlib.suppress(OSError):  # it is gone: there will be no answer
                    process.pipe.send_bytes(request)
                busy[process.pipe] = process, number, time.monotonic()
            until = min((since + seconds for _, _, since in busy.values()), default=0.0)
            ready = wait([*busy], timeout=max(min(until - time.monotonic(), _LOOK_SECONDS), 0.0))
            for pipe, (process, number, since) in [*busy.items()]:
                late = time.monotonic() - since >= seconds
                if pipe in ready:
                    results[number] = process.received()
                elif (found := Returned(late=True, ended=True) if late else process.looked_at()) is not None:
                    results[number] = found
                else:
                    continue
                del busy[pipe]
                if results[number].ended:
                    process.end()
                    self._processes.remove(process)
                else:
                    idle.append(process)
            self.stop()
        for process in self._processes:
            process.cut_output()
        return results

    def _ready(self, count: int, *, anew: bool = False) -> list[_Process]:
        """So many processes that have imported their functions; beside those that are there, where `anew`."""
        for process in [] if anew else [each for each in self._processes if has_ended(each.process.pid)]:
            process.end()  # it has ended between two calls
            self._processes.remove(process)
        there = [] if anew else self._processes[:count]
        started = [_Process(self._pickled, self) for _ in range(count - len(there))]
        self._processes += started
        for process in started:
            process.require_ready(", ".join(self.functions))
        return [*there, *started]

    def close(self) -> None:
        """End the processes and whatever they have started."""
        while self._processes:
            self._processes.pop().end()


class _Process:
    """A process and our end of its socket."""

    def __init__(self, pickled: bytes, of: Workers):
        self.log: IO[bytes] | None = None
        if of.log is not None:
            with contextlib.suppress(OSError):  # a full disk is noticed by whoever writes the run
                of.log.parent.mkdir(parents=True, exist_ok=True)
                self.log = open(of.log, "ab", buffering=0)  # noqa: SIM115
        self.memory = of.memory_bytes or psutil.virtual_memory().available // 2
        self.plain, self.looks = of.isolated, 0
        ours, theirs = socket.socketpair()
        bound = struct.pack("ll", _STALL_SECONDS, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, bound)
        output = subprocess.DEVNULL if self.log is None else self.log
        code = f"import sys; sys.path[:] = {sys.path!r}; from jaxrl_llm.sandbox.workers import serve; "
        code += f"serve({theirs.fileno()}, {threading.current_thread() is _MAIN}, {of.isolated})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | UNBUFFERED if of.environment is None else dict(of.environment),
        )
        theirs.close()
        self.pipe = Connection(ours.detach())
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(pickled)

    def require_ready(self, functions: str) -> None:
        found = self.received() if self.pipe.poll(START_SECONDS) else Returned(error=f"waits for {START_SECONDS:g} s")
        if found.error is not None:
            raise ValueError(
                f"a process for {functions} did not start: it {found.error}; import what the functions need at the top "
                "of their module, and guard a script with if __name__ == '__main__'"
            )

    def received(self) -> Returned:
        try:
            data = self.pipe.recv_bytes(MOST_ANSWER if self.plain else None)
            value, error = _plain(data) if self.plain else pickle.loads(data)
            return Returned(value, error)
        except (EOFError, ConnectionError):
            return Returned(error=f"ended its process, which {self._end()}", ended=True, crashed=True)
        except Exception as error:
            return Returned(error=f"returned what cannot be read: {_told(error)}", ended=True)

    def _end(self) -> str:
        deadline = time.monotonic() + END_SECONDS
        while not has_ended(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.002)
        if not has_ended(self.process.pid):
            return "had closed its connection"
        killed_with_descendants(self.process.pid)  # before its number may become another's
        code = self.process.wait()
        number = -code if code < 0 else code - 128 if self.plain else 0  # an isolated one is the child of a child
        return f"was killed by {signal_name(number)}" if number > 0 else f"ended with status {code}"

    def looked_at(self) -> Returned | None:
        """Whether it has to be ended; its descendants, which take longer to see, are looked at each tenth time."""
        self.looks += 1
        self.cut_output()
        if (used := memory_of(self.process.pid, whole=self.looks % 10 == 0)) > self.memory:
            told = f"used {used / 2**30:.1f} GiB of memory, of which it may have {self.memory / 2**30:.1f}"
            return Returned(error=told, ended=True)
        return None

    def cut_output(self) -> None:
        if self.log is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self.log.fileno()).st_size > MOST_OUTPUT:
                    os.ftruncate(self.log.fileno(), 0)
                    self.log.write(f"(the first {MOST_OUTPUT >> 20} MiB of output were dropped)\n".encode())

    def end(self) -> None:
        """Kill it and what it has started."""
        if self.process.returncode is None:
            killed_with_descendants(self.process.pid)
            self.process.wait()
        self.pipe.close()
        if self.log is not None:
            self.log.close()


def signal_name(number: int) -> str:
    """Of a signal, among them those that have only a number."""
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


def has_ended(child: int) -> bool:
    """Whether a child of this process has ended; its number is its own until it is waited for."""
    try:
        return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def killed_with_descendants(pid: int, *, itself: bool = True) -> None:
    """Kill a process that leads a group, and all that it has started, whatever group that has gone to."""
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(pid)
        for _ in range(100):  # some may be started while others are killed; the leader, stopped, adopts them
            if itself:
                leader.suspend()
            living = [each for each in leader.children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
            if not living:
                break
            _each(psutil.Process.kill, living)
    if itself:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _each(does: Callable[[psutil.Process], Any], processes: Iterable[psutil.Process]) -> list[Any]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            found.append(does(process))
    return found


def memory_of(pid: int, *, whole: bool) -> int:
    """Bytes of memory of a process, or of it and its descendants."""
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(pid)
        processes = [leader, *leader.children(recursive=True)] if whole else [leader]
        return sum(_each(lambda each: each.memory_info().rss, processes))
    return 0


def _plain(data: bytes) -> tuple[Any, str | None]:
    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in _PLAIN:
                raise pickle.UnpicklingError(f"{module}.{name} is no plain data, which is all that is taken from there")
            return super().find_class(module, name)

    value, error = Reader(io.BytesIO(data)).load()
    return value, None if error is None else str(error)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# ---- the other process ----------------------------------------------------------------------------------------------


def serve(file: int, of_main_thread: bool, isolated: bool) -> None:
    """The life of the process: requests in, answers out, until the socket closes."""
    adopt_orphans()
    if of_main_thread:  # Linux would end it with the thread that has started it
        die_with_parent()
    pipe = Connection(file)
    try:
        functions = {name: _function(each) for name, each in pickle.loads(pipe.recv_bytes()).items()}
        if isolated:
            _isolate(file)
    except BaseException as error:
        traceback.print_exc()
        pipe.send_bytes(pickle.dumps((None, f"raised {_told(error)}")))
        return
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            name, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer = functions[name](*arguments), None
        except BaseException as error:
            traceback.print_exc()
            answer = None, f"raised {_told(error)}"
        try:
            data = pickle.dumps(answer)
        except Exception as error:
            data = pickle.dumps((None, f"returned what does not pickle, so its process cannot send it: {_told(error)}"))
        pipe.send_bytes(data)


def _isolate(file: int) -> None:
    """Go on in an isolated process that has nothing open but its socket and its output."""
    if lacking := missing(found := facilities()):
        raise SandboxError(f"nothing here keeps a function from {' and '.join(lacking)}")
    child = os.fork()  # namespaces are entered by a process with one thread, and imports may have started others
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    die_with_parent()
    os.closerange(3, file)
    os.closerange(file + 1, 1 << 16)
    entered(found, Limits(), lasting=True)


def _function(given: Any) -> Callable[..., Any]:
    if not isinstance(given, str):
        return given
    module, _, name = given.partition(":")
    return getattr(importlib.import_module(module), name)
