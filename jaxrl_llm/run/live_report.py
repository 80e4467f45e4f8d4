"""Updates of a run's report during the run and at its end, and the token fields of samples.jsonl."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxrl_llm.config import Config
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting.loggers import logger_openers
from jaxrl_llm.reporting.report import write_report
from jaxrl_llm.reporting.reported_run import read_run
from jaxrl_llm.run.recipes import entry_of, user_function

_SECONDS, _SHARE = 60.0, 0.02  # shortest time between two updates, and largest share of the run's time for them


class LiveReport:
    """report.html of a run: updated at times, written at the end; failures to write do not end the run.

    Args:
      config: of the run; with `reporting.report` None the report is written if jinja2 is installed.
      tell: prints a message.
      clock: seconds.
    """

    def __init__(self, config: Config, tell: Callable[[str], Any], clock: Callable[[], float] = time.monotonic):
        wanted = config.reporting.report
        there = importlib.util.find_spec("jinja2") is not None
        if wanted and not there:
            raise ValueError(
                "reporting.report is true, but jinja2 is missing; install the extra: pip install 'jaxrl_llm[report]'"
            )
        self.path = config.directory if there and wanted is not False and hosts.is_main() else None
        self._tell, self._clock, self._next = tell, clock, clock() + _SECONDS

    def refresh(self, *, now: bool = False) -> Path | None:
        """Write the report if it is due, or with `now`."""
        begun = self._clock()
        if self.path is None or (begun < self._next and not now):
            return None
        try:
            return write_report([read_run(self.path)], self.path / "report.html")
        except (ValueError, OSError) as error:
            self._tell(f"the report was not written: {error}")
            return None
        finally:
            self._next = self._clock() + max(_SECONDS, (self._clock() - begun) / _SHARE)


def reporting_of(config: Config, console: Console) -> tuple[LiveReport, dict[str, Any]]:
    """(the report of a run, what its directory hands numbers to), checked before the run starts."""
    named = [entry_of(entry, "reporting.loggers") for entry in config.reporting.loggers]
    tell = partial(console.print, markup=False)
    return LiveReport(config, tell), {"loggers": logger_openers(named, user_function), "warn": tell}
