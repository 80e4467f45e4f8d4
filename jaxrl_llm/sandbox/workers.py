"""Calls of functions in other processes, with deadlines and limits; processes are killed with their descendants.

Each process leads its own session, and all its descendants, daemons included, stay below it in the process tree, so
none survives it. Requests and answers are sent through a socket. Answers of an isolated process must be plain data,
since unpickling anything else could execute code in this process.
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

START_SECONDS = 120.0  # seconds for the imports of a process, which deadlines of calls do not include
END_SECONDS = 5.0  # seconds for a process to end after closing its connection
MOST_OUTPUT = 16 << 20  # largest size of the log file in bytes
MOST_ANSWER = 256 << 20  # largest size of one answer of an isolated process in bytes
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}
# Environment variables passed to isolated processes.
BARE = UNBUFFERED | {"PATH": os.defpath, "HOME": FOLDER, "TMPDIR": FOLDER, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
BARE |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {"JAX_PLATFORMS": "cpu"}
_LOOK_SECONDS = 0.1  # seconds between two checks of memory and output
_STALL_SECONDS = 60  # seconds that a process may pause in the middle of an answer
_MAIN = threading.main_thread()
# Types allowed in answers of isolated processes, beside plain data.
_PLAIN = {
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("jaxrl_llm.rewards.host", "Answers"),
}


class Returned(NamedTuple):
    """The outcome of a call.

    Attributes:
      value: result of the function.
      error: reason for a missing value, as a predicate ("raised KeyError: ..."); None if the function returned.
      late: whether the call exceeded its deadline.
      ended: whether the process of the call has ended or must be ended.
      crashed: whether the process ended by itself.
    """

    value: Any = None
    error: str | None = None
    late: bool = False
    ended: bool = False
    crashed: bool = False


@dataclass(eq=False)
class Workers:
    """Processes that call functions. They start at the first call, and end with `close` or with this process.

    Attributes:
      functions: functions by name. Each must be picklable, such as a top-level function of a module, or a string
        "module:function", which is imported only in the other process.
      workers: number of simultaneous calls, each in its own process.
      memory_bytes: memory limit of a process with its descendants; None: half of the free memory.
      log: file to which their output and tracebacks are appended; None discards them.
      stop: called while waiting for an answer; an exception in it aborts the calls.
      environment: environment variables; None: those of this process, but without access to the devices.
      isolated: the processes lose access to files, network and other processes after importing their functions. Answers
        must be plain data: numbers, text, arrays, lists, dictionaries.

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
        """The outcome of each call, in order.

        Args:
          name: name of the function.
          calls: arguments of each call.
          seconds: longest duration of each call from its start; the process of a longer call is killed.

        Raises:
          ValueError: if a process does not start.
        """
        with self._one_at_a_time:
            try:
                return self._called(name, calls, seconds)
            except BaseException:  # a late answer would be mistaken for that of the next call
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
                    results[number] = Returned(
                        error=f"was not called, as its arguments cannot be pickled: {_told(error)}"
                    )
                    idle.append(process)
                    continue
                with contextlib.suppress(OSError):  # the process has ended, which is found when its answer is read
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
        """This number of processes that have imported their functions; with `anew`, in addition to existing ones."""
        for process in [] if anew else [each for each in self._processes if has_ended(each.process.pid)]:
            process.end()  # it ended between two calls
            self._processes.remove(process)
        there = [] if anew else self._processes[:count]
        started = [_Process(self._pickled, self) for _ in range(count - len(there))]
        self._processes += started
        for process in started:
            process.require_ready(", ".join(self.functions))
        return [*there, *started]

    def close(self) -> None:
        """End the processes and their descendants."""
        while self._processes:
            self._processes.pop().end()


class _Process:
    """A process, and this process's end of the socket to it."""

    def __init__(self, pickled: bytes, of: Workers):
        self.log: IO[bytes] | None = None
        if of.log is not None:
            with contextlib.suppress(OSError):  # a full disk is reported when the run writes its own files
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
        found = self.received() if self.pipe.poll(START_SECONDS) else Returned(error=f"took over {START_SECONDS:g} s")
        if found.error is not None:
            raise ValueError(
                f"a process for {functions} did not start: it {found.error}; import all that the functions need at "
                "the top of their module, and guard a script with if __name__ == '__main__'"
            )

    def received(self) -> Returned:
        try:
            data = self.pipe.recv_bytes(MOST_ANSWER if self.plain else None)
            value, error = _plain(data) if self.plain else pickle.loads(data)
            return Returned(value, error)
        except (EOFError, ConnectionError):
            return Returned(error=f"ended its process, which {self._end()}", ended=True, crashed=True)
        except Exception as error:
            return Returned(error=f"returned an answer that cannot be read: {_told(error)}", ended=True)

    def _end(self) -> str:
        deadline = time.monotonic() + END_SECONDS
        while not has_ended(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.002)
        if not has_ended(self.process.pid):
            return "had closed its connection"
        killed_with_descendants(self.process.pid)  # before its pid can be reused
        code = self.process.wait()
        # An isolated process is a child of this child, which exits with 128 + signal.
        number = -code if code < 0 else code - 128 if self.plain else 0
        return f"was killed by {signal_name(number)}" if number > 0 else f"ended with status {code}"

    def looked_at(self) -> Returned | None:
        """An error if the process needs too much memory; every tenth check includes its descendants, which is slow."""
        self.looks += 1
        self.cut_output()
        if (used := memory_of(self.process.pid, whole=self.looks % 10 == 0)) > self.memory:
            told = f"used {used / 2**30:.1f} GiB of memory, more than its limit of {self.memory / 2**30:.1f} GiB"
            return Returned(error=told, ended=True)
        return None

    def cut_output(self) -> None:
        if self.log is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self.log.fileno()).st_size > MOST_OUTPUT:
                    os.ftruncate(self.log.fileno(), 0)
                    self.log.write(f"(the first {MOST_OUTPUT >> 20} MiB of output were dropped)\n".encode())

    def end(self) -> None:
        """Kill the process and its descendants."""
        if self.process.returncode is None:
            killed_with_descendants(self.process.pid)
            self.process.wait()
        self.pipe.close()
        if self.log is not None:
            self.log.close()


def signal_name(number: int) -> str:
    """The name of a signal, or its number if it has no name."""
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


def has_ended(child: int) -> bool:
    """Whether a child of this process has ended; its pid is not reused until it is waited for."""
    try:
        return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def killed_with_descendants(pid: int, *, itself: bool = True) -> None:
    """Kill the leader of a process group and all its descendants, including those in other groups."""
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(pid)
        for _ in range(100):  # new processes may be started meanwhile; the suspended leader adopts them
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
                raise pickle.UnpicklingError(f"{module}.{name} is not plain data; only plain data is allowed")
            return super().find_class(module, name)

    value, error = Reader(io.BytesIO(data)).load()
    return value, None if error is None else str(error)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# ---- the other process ----------------------------------------------------------------------------------------------


def serve(file: int, of_main_thread: bool, isolated: bool) -> None:
    """Main loop of the process: read requests and send answers until the socket closes."""
    adopt_orphans()
    if of_main_thread:  # Linux kills it when the thread that started it ends
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
            data = pickle.dumps(
                (None, f"returned a value that cannot be pickled, so its process cannot send it: {_told(error)}")
            )
        pipe.send_bytes(data)


def _isolate(file: int) -> None:
    """Fork, and continue in an isolated child with no open files but the socket and the output."""
    if lacking := missing(found := facilities()):
        raise SandboxError(f"functions cannot be isolated here: no protection of {' and '.join(lacking)}")
    child = os.fork()  # only a process with one thread can enter namespaces, and imports may have started threads
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
