"""The terminal of a command: output that its reader may close while a run continues, and Ctrl-C that is never lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from jaxrl_llm.bounds import shortened


class Lasting:
    """A stream whose `write` never fails, also when its reader has closed it or its disk is full."""

    def __init__(self, stream: Any):
        self.stream, self.closed_for_good = stream, stream is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._quietly("write", text)
        return len(text)

    def flush(self) -> None:
        self._quietly("flush")

    def _quietly(self, name: str, *arguments: str) -> None:
        if not self.closed_for_good:
            try:
                getattr(self.stream, name)(*arguments)
            except (OSError, ValueError):
                self.closed_for_good = True


def unwrapped(stream: Any) -> Any:
    """The stream that a `Lasting` one wraps; any other stream itself."""
    return stream.stream if isinstance(stream, Lasting) else stream


def message_of(error: BaseException) -> str:
    """The message of an error for the user; of a system error, its path and its cause."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{shortened(str(error.filename), 200)} cannot be used: {error.strerror}"
    return shortened(str(error), 4000)


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """A context in which Ctrl-C works while a callback of the garbage collector runs: Python only reports an exception
    that is raised there, so it is raised once more."""
    before = sys.unraisablehook

    def reported(told: Any) -> None:
        if isinstance(told.exc_value, KeyboardInterrupt):
            main = threading.main_thread().ident or 0
            # After the callback; a signal also ends what the main thread waits for.
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            before(told)

    sys.unraisablehook = reported
    try:
        yield
    finally:
        sys.unraisablehook = before
