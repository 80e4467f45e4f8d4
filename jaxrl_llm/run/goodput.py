"""Goodput: the useful share of the seconds of a run's processes over all its starts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.reporting.run_directory import STARTS

_SECONDS = 30.0  # seconds between two records; up to this much of a killed start is not counted
SET_UP, COMPILING = "set-up", "compilation"


@dataclass
class Lifetime:
    """The duration of this start of a run, recorded periodically because of possible kills.

    Attributes:
      directory: of the run.
      began: `time.monotonic()` of the start.
    """

    directory: RunDirectory
    began: float
    started: float = field(default_factory=time.time)
    _said: float = 0.0

    def mark(self, *, now: bool = False) -> None:
        """Record the duration, if the last record is half a minute old, or with `now`."""
        alive = time.monotonic() - self.began
        if now or not self._said or alive > self._said + _SECONDS:
            self._said = alive
            self.directory.write_start({"started": round(self.started, 3), "seconds": round(alive, 3)})


def goodput(directory: Path, seconds: Mapping[str, float], compiling: float) -> dict[str, Any]:
    """Useful seconds divided by paid seconds of a run.

    Args:
      directory: of the run, with starts.jsonl.
      seconds: by part, without work that was lost to kills.
      compiling: compilation time in them, outside of the set-up.

    Returns:
      useful_seconds: of steps, evaluations and checkpoints, without set-up and compilation. paid_seconds: of all
      starts. share: their ratio. starts: number of starts.
    """
    lived: dict[float, float] = {}
    with contextlib.suppress(OSError):
        for line in (directory / STARTS).read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line truncated by a kill
                record = json.loads(line)
                lived[record["started"]] = max(lived.get(record["started"], 0.0), record["seconds"])
    useful = max(0.0, sum(value for name, value in seconds.items() if name != SET_UP) - compiling)
    paid = max(sum(lived.values()), useful)
    return {
        "useful_seconds": round(useful, 3),
        "paid_seconds": round(paid, 3),
        "share": round(useful / paid, 4) if paid else 0.0,
        "starts": max(1, len(lived)),
    }
