"""A process that answers lines of JSON: what it runs may hang, grow or crash without harm to the one that asks."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_START_SECONDS = 60.0


class Worker:
    """A script that prints `true` when it is there, and then a line of JSON for each line that it reads.

    It is started when it is first asked, ended when this process ends, and started anew after it died. A process that
    was forked starts one of its own.

    Attributes:
      script: the file; it imports nothing that lies beside it.
    """

    def __init__(self, script: Path):
        self.script = script
        self._forget()
        atexit.register(self.end)

    def _forget(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner, self._one_at_a_time = os.getpid(), threading.Lock()

    def ask(self, request: Any, seconds: float) -> tuple[Any] | None:
        """The answer in a tuple; None where it took longer than so many seconds, or the process died of it.

        Raises:
          ValueError: where the process does not start.
        """
        if self._owner != os.getpid():
            self._forget()
        with self._one_at_a_time:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = _line(process, seconds)
            except BrokenPipeError:
                line = ""
            if not line.endswith("\n"):
                self.end()
                return None
            return (json.loads(line),)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            # -P: modules beside the script, such as numbers, must not hide those of the standard library.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(self.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            if not _line(self._process, _START_SECONDS):
                self.end()
                raise ValueError(f"{self.script} did not start; run it to see why: {sys.executable} -P {self.script}")
        return self._process

    def end(self) -> None:
        """End the process, if it is there."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line that it prints; "" where it takes longer, or is gone."""
    assert process.stdout is not None
    return process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else ""
