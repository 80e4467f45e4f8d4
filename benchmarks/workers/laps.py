"""The other end of `side_by_side.Worker`: a process that answers one request a lap and waits for the next.

This folder imports nothing of the project, because its scripts run under the interpreters of other projects too.
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
    """The most bytes of main memory that this process had at a time."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux; there the kernel counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def laps() -> Callable[..., dict[str, Any]]:
    """`lap(**facts) -> request`: answers the last request with facts and its seconds, and waits for the next.

    The seconds of all its threads together are told too: they say more than the clock where others use the machine.

    The first lap answers that the worker is ready. When nobody asks any more the process ends, however deep in another
    project's training loop it is.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
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
    """What to do, the workload, and the directory of the weights: the arguments of a worker."""
    what, described, directory = sys.argv[1:]
    return what, json.loads(described), Path(directory)
