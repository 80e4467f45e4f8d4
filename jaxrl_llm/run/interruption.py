"""Interruption of a run: signals, and a watchdog for stalled steps.

The first signal requests a stop at the end of the step. A separate thread ends the process at a second one, at the end
of the grace period, and for the watchdog, even while the main thread is in a program or in the compiler.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.peers import exit_now
from jaxrl_llm.reporting.shares import own_folder
from jaxrl_llm.run.failures import RESTARTABLE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LEAST_SECONDS = 600.0  # shortest wait of the watchdog in seconds: a step may compile


class Abandoned(Exception):
    """A step is aborted, because a stop was requested and the step would take too long."""


@dataclass
class Interruption:
    """Requested stops and the progress of a run.

    Attributes:
      directory: of the run, on this machine.
      say: prints a message.
      saved: () -> the last saved step; None for none.
      grace: longest time in seconds between the first signal and the end; None waits for the end of the step.
      stalled_after: the watchdog ends a run whose step takes this multiple of the median; 0: never.
      least: shortest wait of the watchdog in seconds.
      number: number of the first signal; None before it.
      doing: current activity, for messages.
      opened: whether the run directory exists.
      place: path or address of the run for messages, if not `directory`.
      brought: uploads a file of the run to its address, and returns where it is.
    """

    directory: Path
    say: Callable[[str], Any]
    saved: Callable[[], int | None]
    grace: float | None = None
    stalled_after: float = 0.0
    least: float = _LEAST_SECONDS
    number: int | None = None
    doing: str = "set-up"
    opened: bool = False
    place: str = ""
    brought: Callable[[Path], Any] = str
    _asked_at: float = 0.0
    _steps: list[float] = field(default_factory=list)
    _mark: float | None = None

    @property
    def asked(self) -> bool:
        """Whether a stop was requested."""
        return self.number is not None

    def step_done(self, doing: str) -> None:
        """Record that a step has ended and the next begins."""
        now = time.monotonic()
        if self._mark is not None:
            self._steps = [*self._steps[-50:], now - self._mark]
        self._mark, self.doing = now, doing

    def busy(self, doing: str) -> None:
        """Record that something other than a step begins, which the watchdog ignores."""
        self._mark, self.doing = None, doing

    @property
    def median(self) -> float | None:
        """Median duration of a step in seconds; None before three have ended."""
        return statistics.median(self._steps) if len(self._steps) >= 3 else None

    def give_up_the_step(self) -> None:
        """Raise Abandoned if the current step is not expected to end within half of the grace period.

        With several processes the step is always finished, since they would have to agree.
        """
        if self.number is None or self.grace is None or hosts.peers() is not None:
            return
        left = self._asked_at + self.grace / 2 - time.monotonic()
        known = self.median is not None and self._mark is not None
        expected = self._mark + self.median - time.monotonic() if known else 0.0  # type: ignore[operator]
        if left <= 0 or expected > left:
            raise Abandoned

    def hearing(self, write: Callable[[Any], Any] | None, *, during: bool) -> Callable[[Any], None]:
        """A callback for each batch of an evaluation: writes it, and aborts the evaluation if the run must end.

        Evaluations before and after the steps are aborted at once, since they are repeated; those `during` the steps
        are aborted like a step. Several processes stop only at the end of a step.
        """

        def heard(batch: Any) -> None:
            if write is not None:
                write(batch)
            if during:
                self.give_up_the_step()
            elif self.asked and hosts.peers() is None:
                raise Abandoned

        return heard

    def handle(self, number: int, frame: Any) -> None:
        """A signal, in the main thread; the thread of `watch` ends the process at the second one."""
        if self.number is not None:
            return
        self.number, self._asked_at = number, time.monotonic()
        self.say("stopping after this step; its state will be saved (again to stop at once)")

    def way_on(self) -> str:
        """Message with the last saved step and the command to continue."""
        # On a disk of its own, a process other than the main one has the directory without config.yaml.
        there = (self.directory / "config.yaml").is_file() or (self.directory.is_dir() and not hosts.is_main())
        if self.opened and not there:
            return f"put it back, and go on with: jaxrl train --resume {self.place or self.directory}"
        try:
            step = self.saved()
        except OSError:
            step = None
        if step is None:
            if self.opened:
                return f"no checkpoint yet; begin anew with: jaxrl train --resume {self.place or self.directory}"
            return f"no checkpoint yet; start again with another run_dir, or remove {self.place or self.directory}"
        return (
            f"the last good checkpoint is step {step}; go on with: jaxrl train --resume {self.place or self.directory}"
        )

    def watch(self, pipe: int, stop: threading.Event) -> None:
        """The main function of the thread."""
        seen: list[int] = []
        while not stop.is_set():
            if select.select([pipe], [], [], 0.25)[0]:
                with contextlib.suppress(BlockingIOError):
                    seen += [number for number in os.read(pipe, 64) if number in SIGNALS]
            now = time.monotonic()
            if seen and not self._asked_at:
                self._asked_at = now
            if len(seen) > 1:  # without the main thread, which may wait for a program at the interpreter's exit, too
                return self.end(128 + seen[-1], f"stopped at once; {self.way_on()}")
            if seen and self.grace is not None and now > self._asked_at + self.grace and not stop.is_set():
                what = f"{self.doing} did not end within {self.grace:g} s"
                return self.end(128 + (self.number or signal.SIGTERM), f"stopped: {what}; {self.way_on()}")
            mark, median = self._mark, self.median
            if mark is not None and median is not None and self.stalled_after:
                most = max(self.stalled_after * median, self.least)
                if now > mark + most and not stop.is_set():
                    file = self._dump()
                    return self.end(
                        RESTARTABLE,
                        f"error: {self.doing} has taken {most:.0f} s, where a step takes {median:.2g} s; where "
                        f"every thread is was written to {file}; {self.way_on()}",
                    )

    def _dump(self) -> Any:
        file = own_folder(self.directory, jax.process_index()) / "stalled.txt"
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as out:
                faulthandler.dump_traceback(out, all_threads=True)
        return self.brought(file)

    def end(self, status: int, text: str) -> NoReturn:
        """End this process from the thread; the main thread may be blocked."""
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        if (others := hosts.peers()) is not None:
            others.leave(status, text)
        exit_now(status)


@contextlib.contextmanager
def attended(interruption: Interruption) -> Iterator[Interruption]:
    """A context with signal handlers and the watchdog; outside of the main thread, only the watchdog.

    A signal that is ignored at the start stays ignored, so that `nohup` works.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)  # required by `set_wakeup_fd`
    before: dict[int, Any] = {}
    wakeup: int | None = None
    stop = threading.Event()
    try:
        with contextlib.suppress(ValueError):  # not in the main thread: signal handlers cannot be set
            wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, interruption.handle)
        thread = threading.Thread(target=interruption.watch, args=(read, stop), name="interruption", daemon=True)
        thread.start()
        try:
            yield interruption
        finally:
            stop.set()
            thread.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if wakeup is not None:
            signal.set_wakeup_fd(wakeup)
        os.close(read)
        os.close(write)
