"""Goodput: of the seconds in which a run's processes lived, over all its starts, those that its result is made of."""

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

_SECONDS = 30.0  # between two signs of life: so much of a start that was killed may go uncounted
SET_UP, COMPILING = "set-up", "compilation"


@dataclass
class Lifetime:
    """How long this start of a run has lived, written down as it goes, since a kill does not announce itself.

    Attributes:
      directory: of the run.
      began: `time.monotonic()` of the start.
    """

    directory: RunDirectory
    began: float
    started: float = field(default_factory=time.time)
    _said: float = 0.0

    def mark(self, *, now: bool = False) -> None:
        """A sign of life, if the last one is half a minute old, or `now`."""
        alive = time.monotonic() - self.began
        if now or not self._said or alive > self._said + _SECONDS:
            self._said = alive
            self.directory.write_start({"started": round(self.started, 3), "seconds": round(alive, 3)})


def goodput(directory: Path, seconds: Mapping[str, float], compiling: float) -> dict[str, Any]:
    """Useful over paid seconds of a run.

    Args:
      directory: of the run, whose starts.jsonl has all of its starts.
      seconds: by part, along the line of checkpoints that led to the result: what was lost to a kill is not in them.
      compiling: of them, outside of the set-up.

    Returns:
      useful_seconds: of steps, evaluations and checkpoints, without set-up and compilation. paid_seconds: of all
      starts. share: of the two. starts: how many there were.
    """
    lived: dict[float, float] = {}
    with contextlib.suppress(OSError):
        for line in (directory / STARTS).read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill has cut
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
