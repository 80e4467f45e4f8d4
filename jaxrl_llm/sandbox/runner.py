"""The process that runs programs, each in an isolated and supervised fork.

A fork is faster than the start of an interpreter, so programs start quickly although they are isolated.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any, NoReturn

from jaxrl_llm.sandbox.isolation import Limits, die_with_parent, entered, readable
from jaxrl_llm.sandbox.workers import has_ended, killed_with_descendants, memory_of

_REPORT = 3  # file descriptor
_TOLD = ("status", "setup", "done", "value")
_OF_EXCEPTION = ("kind", "text", "part", "errno", "outside")
_LOOK_SECONDS = 0.1


def run(source: str, limits: Limits, using: Collection[str], job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a program and report its outcome.

    Args:
      source: Python source code.
      limits: limits of its processes.
      using: facilities that isolate it.
      job: `stdin`, and `tests` (Python code that is run after the program in its namespace) or `call` (name of a
        function, arguments).

    Returns:
      ended: the limit for which it was killed: "seconds", "output" or "memory"; None if it ended by itself.
      status: wait status of its first process; stdout, stderr: text; seconds: duration.
      setup: error before the program was started.
      kind, text, part, errno, outside: type, message, part of the run, error number, and whether the path is outside of
        its folder, of the exception that ended the program.
      done: whether all tests were run; value: result of the call as JSON.
      The program can write to the report, so all entries but `ended` and `seconds` are untrusted; they are strings,
      integers or None.
    """
    started = time.monotonic()
    folder = "" if "namespaces" in using else tempfile.mkdtemp()
    pipes = [os.pipe() for _ in range(3)]
    with tempfile.TemporaryFile() as stdin:
        stdin.write(job["stdin"].encode())
        stdin.seek(0)
        token = os.urandom(16).hex()
        child = os.fork()
        if child == 0:
            _life(source, limits, using, job, folder, (stdin.fileno(), *(pipe[1] for pipe in pipes)), token)
    for _, theirs in pipes:
        os.close(theirs)
    ended = "error"
    try:
        ended, written = _watched(child, limits, [pipe[0] for pipe in pipes], started)
    finally:
        if folder or ended is not None:
            killed_with_descendants(child)
        os.waitpid(child, 0)
        for ours, _ in pipes:
            os.close(ours)
        if folder or ended is not None:
            _without_children()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    told = _report(written[2])
    told["done"] = told.get("done") == token
    texts = {name: data.decode(errors="replace") for name, data in zip(("stdout", "stderr"), written, strict=False)}
    return {**told, **texts, "ended": ended, "seconds": time.monotonic() - started}


def _watched(child: int, limits: Limits, ours: list[int], started: float) -> tuple[str | None, list[bytes]]:
    """(the limit that was exceeded or None, the data read from each pipe).

    Returns when all writers have closed the pipes, the child has ended, or a limit is exceeded.
    """
    most = (limits.output_bytes, limits.output_bytes, max(limits.output_bytes, 1 << 16))
    data, open_ones, looked = dict.fromkeys(ours, b""), {*ours}, started
    gone = False
    while open_ones:
        left = started + limits.seconds - time.monotonic()
        ready = select.select([*open_ones], [], [], 0 if gone else max(min(left, _LOOK_SECONDS), 0))[0]
        for each in ready:
            piece = os.read(each, 1 << 16)
            data[each] += piece
            open_ones -= set() if piece else {each}
        if any(len(data[each]) > bound for each, bound in zip(ours, most, strict=True)):
            return "output", [data[each][:bound] for each, bound in zip(ours, most, strict=True)]
        if gone and not ready:
            break
        if left <= 0:
            return "seconds", [*data.values()]
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            if memory_of(child, whole=True) > limits.memory_bytes + (64 << 20):
                return "memory", [*data.values()]
            gone = has_ended(child)
    return None, [*data.values()]


def _report(data: bytes) -> dict[str, Any]:
    """The entries of the report; later lines override earlier ones. The program may have written anything to it."""
    told: dict[str, Any] = {}
    for line in data.splitlines():
        try:
            told |= json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
    exception = told.get("exception")
    told |= exception if isinstance(exception, dict) else {}
    flat = {key: told.get(key) for key in (*_TOLD, *_OF_EXCEPTION)}
    return {key: each if isinstance(each, str | int) else None for key, each in flat.items()}


def _without_children() -> None:
    """Kill the processes that a program left behind, which have become children of this process."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                killed_with_descendants(os.getpid(), itself=False)
                time.sleep(0.001)
        except ChildProcessError:
            return


# ---- the program's own process --------------------------------------------------------------------------------------


def _life(
    source: str,
    limits: Limits,
    using: Collection[str],
    job: Mapping[str, Any],
    folder: str,
    files: tuple[int, ...],
    token: str,
) -> NoReturn:
    try:
        die_with_parent()
        os.setsid()
        moved = [os.dup2(file, 64 + number) for number, file in enumerate(files)]
        for number, file in enumerate(moved):
            os.dup2(file, number)
        os.closerange(len(files), 1 << 16)  # most importantly the socket to the calling process
        folder = entered(using, limits, folder=folder, report=_REPORT)
    except BaseException as error:
        os.write(_REPORT, json.dumps({"setup": f"{type(error).__name__}: {error}"}).encode())
        os._exit(70)
    code = 1
    try:
        _own_state(folder, source)
        code = _run(source, job, token)
    finally:
        os._exit(code)


def _own_state(folder: str, source: str) -> None:
    """Set the state of the interpreter as if it had just started with program.py."""
    for name, file, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(file, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    paths = readable()
    sys.path[:] = [folder, *(path for path in sys.path if any(path.startswith(f"{each}/") for each in paths))]
    sys.argv[:] = ["program.py"]
    sys.dont_write_bytecode = True
    os.environ |= {"HOME": folder, "TMPDIR": folder}
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.path.join(folder, "program.py"), "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(source)


def _run(source: str, job: Mapping[str, Any], token: str) -> int:
    """The exit status of the program; all other results are written to the report."""
    folder = os.path.realpath(os.getcwd())
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = "program.py"
    names, told, code = vars(main), {}, 0
    part = "compile"
    try:
        compiled = compile(source, "program.py", "exec")
        part = "program"
        exec(compiled, names)
        part = "tests"
        if job.get("tests") is not None:
            exec(compile(job["tests"], "tests.py", "exec"), names)
            told["done"] = token
        elif job.get("call") is not None:
            name, arguments = job["call"]
            called = names.get(name) or getattr(names["Solution"](), name)
            told["value"] = json.dumps(called(*arguments))
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        code = 1
        _print_exception(error)
        path = error.filename if isinstance(error, OSError) else None
        about = {"kind": type(error).__name__, "text": str(error)[:400], "part": part}
        outside = isinstance(path, str) and not f"{os.path.realpath(path)}/".startswith(f"{folder}/")
        about |= {"errno": getattr(error, "errno", None), "outside": outside}
        told["exception"] = about
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os.write(_REPORT, b"\n" + json.dumps(told).encode() + b"\n")
    return code & 255


def _print_exception(error: BaseException) -> None:
    """The traceback without the frames of this module."""
    own = error.__traceback__
    while own is not None and own.tb_frame.f_code.co_filename == __file__:
        own = own.tb_next
    traceback.print_exception(type(error), error, own)
