"""Failures of the machine: temporary ones, and those that need a repair."""

from __future__ import annotations

import contextlib
import errno
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxrl_llm.endpoints import EndpointError
from jaxrl_llm.evaluation import GraderError
from jaxrl_llm.parallel.peers import LOST
from jaxrl_llm.rewards import RewardError

# Beginnings of messages of temporary failures of storage and devices (absl status codes of XLA and TensorStore).
_PASSING = ("UNAVAILABLE", "INTERNAL", "DATA_LOSS", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED")
_PASSING_ERRNO = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH}
_PASSING_ERRNO |= {errno.EREMOTEIO} if hasattr(errno, "EREMOTEIO") else set()  # macOS has none
_STORAGE_ERRNO = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
    errno.ENOENT: "it was moved or deleted",
    errno.ENOTDIR: "it was moved or deleted",
    errno.ENAMETOOLONG: "a name in its path is too long",
    errno.EFBIG: "a file is larger than is allowed",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
}
RESTARTABLE = LOST  # exit status: the same run may be started again, and may then go on


class StorageError(RuntimeError):
    """The storage of a run cannot be written; after a repair the run can be resumed."""


class PassingError(RuntimeError):
    """A temporary failure of storage or a device; the run may be restarted."""


def passing(error: BaseException) -> bool:
    """Whether an error of the system, of XLA or of TensorStore may be temporary."""
    if _number(error) in _PASSING_ERRNO:
        return True
    text = str(error).lstrip()
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return text.startswith(_PASSING)
    # TensorStore reports DATA_LOSS for a damaged file, which is not temporary.
    return isinstance(error, (OSError, ValueError)) and text.startswith(("UNAVAILABLE:", "DEADLINE_EXCEEDED:"))


def storage_fault(error: BaseException) -> str | None:
    """A clause that describes a disk failure; None for other errors."""
    return _STORAGE_ERRNO.get(_number(error) or 0)


def _number(error: BaseException) -> int | None:
    """The errno of a system error; TensorStore has it in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    return None if found is None else int(found[1])


@contextlib.contextmanager
def named(directory: Path, way_on: Callable[[], str]) -> Iterator[None]:
    """A context that turns failures of storage and devices into one sentence with the cause and the way to continue.

    Args:
      directory: of the run.
      way_on: returns the last saved step and the command to continue.

    Raises:
      StorageError: for a disk that is full, read-only, or gone.
      PassingError: for temporary failures.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("jaxrl_llm."):  # it has its own message
            raise
        for one in _chain(error):
            name = getattr(one, "filename", None) or directory
            if passing(one):
                raise PassingError(f"{_first_line(one)}; {way_on()}") from error
            inside = str(name).startswith((str(directory), str(directory.resolve())))
            if inside and (clause := storage_fault(one)) is not None:
                raise StorageError(f"run {directory} cannot be written: {name}: {clause}; {way_on()}") from error
        raise


@contextlib.contextmanager
def continued(interruption: Any) -> Iterator[None]:
    """A context that adds the way to continue to an error of a function, a judge, an engine or an environment.

    Before the run has begun (`Interruption.opened`) there is none.
    """
    try:
        yield
    except (RewardError, EndpointError, GraderError) as error:
        if not interruption.opened:
            raise
        raise type(error)(f"{error}; {interruption.way_on()}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its chain of causes, the first cause last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def without_loose_ends() -> Iterator[None]:
    """Suppress the tracebacks of other pending reads of orbax when one read fails."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    failed = False
    try:
        yield
    except Exception:
        failed = True
        raise
    finally:
        if failed:
            time.sleep(0.1)  # they are still ending
            gc.collect()
        sys.unraisablehook = before
