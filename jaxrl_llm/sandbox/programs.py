"""Isolated runs of programs that a model has generated, with limits and a verdict."""

from __future__ import annotations

import atexit
import errno
import functools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_llm.sandbox.isolation import Limits, SandboxError, missing
from jaxrl_llm.sandbox.workers import BARE, Workers, signal_name

Verdict = Literal["pass", "fail", "error", "timeout", "forbidden"]
_SETUP_SECONDS = 30.0
_EVERYTHING = {"namespaces", "landlock", "seccomp"}
_DENIED = {errno.EPERM, errno.EACCES, errno.EROFS}
_runners = Workers(
    {"run": "jaxrl_llm.sandbox.runner:run", "facilities": "jaxrl_llm.sandbox.isolation:facilities"},
    workers=max(1, min(8, os.cpu_count() or 1)),
    environment=BARE,
)
atexit.register(_runners.close)
_told = set[frozenset[str]]()


class Program(NamedTuple):
    """A program and its inputs.

    Attributes:
      source: Python source code.
      stdin: text of its standard input.
      tests: Python code that is run after the program in its namespace, and raises an exception if a test fails.
      call: (name, arguments) of a function of the program, or a method of its class Solution, that is called with these
        arguments. Arguments and result are JSON values.
    """

    source: str
    stdin: str = ""
    tests: str | None = None
    call: tuple[str, Sequence[Any]] | None = None


class Outcome(NamedTuple):
    """The outcome of a program.

    Attributes:
      verdict: "pass": the program exited with status 0, and all its tests were run. "fail": a test raised
        AssertionError. "timeout": it exceeded its time limit. "forbidden": it was killed for a forbidden system call,
        or ended with an exception because access was denied. "error": anything else, such as another exception, a
        crash, too much memory or output, or an exit before its tests had ended.
      detail: the reason for the verdict in one line; empty for "pass".
      stdout, stderr: text of standard output and standard error.
      value: result of the call.
      seconds: duration from start to end.
    """

    verdict: Verdict
    detail: str = ""
    stdout: str = ""
    stderr: str = ""
    value: Any = None
    seconds: float = 0.0


@functools.cache
def facilities() -> frozenset[str]:
    """The working facilities for programs: some of namespaces, landlock, landlock signals, seccomp, user."""
    (found,) = _runners("facilities", [()], _SETUP_SECONDS)
    if found.error is not None:
        raise SandboxError(f"the process that runs programs {found.error}")
    return found.value


def require_isolation(using: frozenset[str] | None = None, remedy: str = "") -> None:
    """Raise SandboxError if code cannot be isolated.

    Args:
      using: facilities; None: those of this machine.
      remedy: last sentence of the message; "" suggests allow_unisolated.

    Raises:
      SandboxError: naming the unprotected resources.
    """
    if lacking := missing(facilities() if using is None else using):
        raise SandboxError(
            f"code that a model wrote cannot be isolated here: no protection of {', '.join(lacking)}. Use Linux with "
            "user namespaces, or with Landlock (since Linux 6.12 it protects other processes, too) and seccomp; a "
            f"container may disable them. {remedy or 'Set allow_unisolated to run it with limits alone'}"
        )


def run_programs(
    programs: Sequence[Program],
    *,
    limits: Limits | None = None,
    allow_unisolated: bool = False,
    without: frozenset[str] | set[str] = frozenset(),
) -> list[Outcome | None]:
    """Run programs written by a model, one per core at a time.

    Args:
      programs: the programs; each runs in a separate process and an empty folder.
      limits: limits of each program; None: `Limits()`.
      allow_unisolated: run them even if files, network or other processes are not protected.
      without: facilities that are not used.

    Returns:
      One outcome per program; None if the sandbox itself failed.

    Raises:
      SandboxError: if the programs cannot be isolated and `allow_unisolated` is false.

    >>> [outcome] = run_programs([Program("print(6 * 7)")], allow_unisolated=True)
    >>> outcome.verdict, outcome.stdout
    ('pass', '42\\n')
    """
    limits, using = limits or Limits(), facilities() - {*without}
    if not allow_unisolated:
        require_isolation(using)
    if using not in _told and not using >= _EVERYTHING:
        _told.add(using)
        lacking, absent = missing(using), ", ".join(sorted(_EVERYTHING - using))
        told = f"no protection of {', '.join(lacking)}" if lacking else "the other facilities protect all resources"
        warnings.warn(f"code that a model wrote is run without {absent}: {told}", RuntimeWarning, stacklevel=2)
    calls = [(p.source, limits, using, {"stdin": p.stdin, "tests": p.tests, "call": p.call}) for p in programs]
    found = _runners("run", calls, limits.seconds + _SETUP_SECONDS)
    return [
        None if each.error or each.late else _outcome(each.value, p) for each, p in zip(found, programs, strict=True)
    ]


def _outcome(told: Mapping[str, Any], program: Program) -> Outcome | None:
    if told["setup"] is not None and told["status"] is None and told["ended"] is None:
        return None  # the sandbox failed; a started program has a status and cannot cause this by its report
    value, (verdict, detail) = None, _verdict(told, program)
    if verdict == "pass" and program.call is not None:
        try:
            value = json.loads(told["value"])
        except (TypeError, ValueError, RecursionError):
            verdict, detail = "error", "returned a value that JSON cannot represent"
    return Outcome(verdict, detail, told["stdout"], told["stderr"], value, told["seconds"])


def _verdict(told: Mapping[str, Any], program: Program) -> tuple[Verdict, str]:
    if told["ended"] is not None:
        kind: Verdict = "timeout" if told["ended"] == "seconds" else "error"
        return kind, {"seconds": "took too long"}.get(told["ended"], f"needed too much {told['ended']}")
    try:
        code = os.waitstatus_to_exitcode(told["status"])
    except (TypeError, ValueError, OverflowError):
        return "error", "its processes were killed"
    if code < 0:
        name = signal_name(-code)
        if name == "SIGSYS":
            return "forbidden", "made a forbidden system call"
        return "timeout" if name == "SIGXCPU" else "error", f"was killed by {name}"
    if told["kind"] is not None:
        detail = f"{'does not compile: ' if told['part'] == 'compile' else ''}{told['kind']}: {told['text']}"
        if told["errno"] in _DENIED or (told["errno"] == errno.ENOENT and told["outside"]):
            return "forbidden", detail
        failed = told["kind"] == "AssertionError" and told["part"] == "tests"
        return "fail" if failed else "error", detail
    if code != 0:
        return "error", f"ended with status {code}"
    if program.tests is not None and not told["done"]:
        return "error", "exited before its tests had ended"
    return "pass", ""


def python_tool(
    code: str, *, limits: Limits | None = None, most_characters: int = 2000, allow_unisolated: bool = False
) -> str:
    """The answer of a Python tool: the output of the code, and then the error if there is one.

    Args:
      code: Python code, run in a new process each time.
      limits: as for `run_programs`.
      most_characters: largest number of characters of the answer; the middle of a longer answer is left out.
      allow_unisolated: as for `run_programs`.

    >>> python_tool("print(6 * 7); 1 / 0", allow_unisolated=True)
    '42\\nZeroDivisionError: division by zero\\n'
    """
    (outcome,) = run_programs([Program(code)], limits=limits, allow_unisolated=allow_unisolated)
    if outcome is None:
        return "the tool has failed\n"
    text = outcome.stdout + (f"{outcome.detail}\n" if outcome.detail else "")
    half = most_characters // 2
    return text if len(text) <= most_characters else f"{text[:half]}\n...\n{text[len(text) - half :]}"
