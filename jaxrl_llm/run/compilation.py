"""Counts compilations, and reports each compilation after warm-up with its cause."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
# This event precedes the other one, on the same thread, if the program was in the persistent cache.
_READ_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"


class CompilationWatch:
    """Counts programs compiled in this process while it is open. A context manager.

        with CompilationWatch() as watch:
            ...
            watch.expect_none(report)   # from here on each compilation is reported, with the reason jax gives

    Attributes:
      count: programs compiled so far.
      seconds: time spent compiling them.
      read: programs that were read from the persistent cache instead.
    """

    def __init__(self):
        self.count, self.seconds, self.read = 0, 0.0, 0
        self._reading = threading.local()
        self._open, self._report = False, None
        self._cause = _LastMessage()

    def __enter__(self) -> CompilationWatch:
        self._open = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False
        self.allow()

    def expect_none(self, report: Callable[[str], None]) -> None:
        """From now on call `report` with a message for every program that is compiled or read from the cache."""
        self._report = report
        jax.config.update("jax_explain_cache_misses", True)
        self._cause.attach()

    def allow(self) -> None:
        """Stop reporting: compilations are expected again, since another stage begins."""
        if self._report is not None:
            self._report = None
            jax.config.update("jax_explain_cache_misses", False)
            self._cause.detach()

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        # jax never removes listeners, so a closed watch must ignore later events.
        if not self._open or event not in (_EVENT, _READ_EVENT):
            return
        if event == _READ_EVENT:
            self._reading.now = True
            return
        was_read, self._reading.now = getattr(self._reading, "now", False), False
        if was_read:
            self.read += 1
        else:
            self.count += 1
            self.seconds += duration_secs
        if self._report is not None:
            what = "read from the cache of programs" if was_read else "compiled"
            self._report(f"{what} after warm-up ({duration_secs:.1f} s): {self._cause.text or 'jax gives no cause'}")


class _LastMessage(logging.Handler):
    """Stores the last explanation logged by jax, and keeps it off the terminal."""

    def __init__(self):
        super().__init__()
        self.text = ""
        # Which module of jax explains has changed between versions; all of them report to this logger.
        self._logger = logging.getLogger("jax")

    def attach(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def detach(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("TRACING CACHE MISS"):
            self.text = " ".join(message.split())
        elif not re.search("persistent (compilation )?cache", message, re.I):  # those come with the explanations
            logging.getLogger().handle(record)
