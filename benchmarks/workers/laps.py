"""The process of a `side_by_side.Worker`: it answers one request per lap and waits for the next.

This module does not import the package, since workers of other projects run with their interpreters.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory() -> int:
    """Peak main memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux; on macOS the unit is bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def laps() -> Callable[..., dict[str, Any]]:
    """`lap(**facts) -> request`: answers the last request with facts and its seconds, and waits for the next.

    The answer also has the CPU seconds of all threads, which are more reliable than wall time on a shared machine. The
    first lap reports that the worker is ready. When the pipe is closed, the process exits, also inside another
    project's training loop.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be mixed with answers
    started: tuple[float, float] | None = None

    def lap(**facts: Any) -> dict[str, Any]:
        nonlocal started
        if started is not None:
            facts["seconds"] = time.perf_counter() - started[0]
            facts["cpu_seconds"] = time.process_time() - started[1]
        print(json.dumps({"peak_memory": peak_memory()} | facts), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        started = time.perf_counter(), time.process_time()
        return json.loads(line)

    return lap


def job() -> tuple[str, dict[str, Any], Path]:
    """The arguments of a worker: its job, the workload, and the directory of the weights."""
    what, described, directory = sys.argv[1:]
    return what, json.loads(described), Path(directory)
