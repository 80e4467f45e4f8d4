"""The processes that call users' functions and environments: their log directory, and their end with the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.config import Config
from jaxrl_llm.reporting.shares import own_folder
from jaxrl_llm.rewards import Guarded
from jaxrl_llm.rollout.host_calls import Caller, Returned
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.run.setup import Parts, opened_parts

LOGS = "logs"  # subfolder of output and tracebacks of users' functions
ENVIRONMENT_LOG = "environment.log"


@contextmanager
def guarded_functions(config: Config, compositions: Sequence[Any], stop: Callable[[], None]) -> Iterator[None]:
    """A context in which functions of these compositions log to the run directory; their processes end with it.

    Args:
      config: of the run.
      compositions: of its steps.
      stop: called while waiting for a result; may raise to end the run.
    """
    terms = (term for c in compositions for term in (*c.rewards, *c.credit))
    functions = [term.function for term in terms if isinstance(term.function, Guarded)]
    logs, place = _logs(config)
    for function in functions:
        function.close()  # a process of the test call before the run, which had no log directory
        function.folder, function.place = logs, place
        function.most_failed = config.faults.most_failed_share
        function.stop = stop
    try:
        yield
    finally:
        for function in functions:
            function.close()


def _logs(config: Config) -> tuple[Path, str]:
    """(folder of the logs of this process on this machine, where it can be read after the run)."""
    logs = own_folder(config.directory, jax.process_index()) / LOGS
    return logs, f"{config.place}/{logs.relative_to(config.directory).as_posix()}"


@contextmanager
def opened_environment(config: Config, built: Parts, stop: Callable[[], None]) -> Iterator[Parts]:
    """`opened_parts`, for a run: its Python environment logs to `environment.log` in the run directory.

    Args:
      config: of the run.
      built: its parts.
      stop: called before each turn, and while waiting for a process; may raise to end the run.
    """
    logs, place = _logs(config)
    told = None
    if isinstance(built.environment, HostEnvironment):
        apart = built.environment.executor in ("process", "sandbox")
        told = f"its traceback {'and output are' if apart else 'is'} in {place}/{ENVIRONMENT_LOG}"
    with opened_parts(built, log=logs / ENVIRONMENT_LOG, stop=stop) as ready:
        yield replace(ready, call=attentive(ready.call, stop, told))


def attentive(call: Caller | None, stop: Callable[[], None], told: str | None = None) -> Caller | None:
    """A caller of an environment that calls `stop` before each turn, and adds to errors of calls where their log is."""
    if call is None:
        return None

    def named(result: Returned) -> Returned:
        if told is None or result.error is None:
            return result
        return result._replace(error=f"{result.error} ({told})")

    def asked(name: str, calls: Sequence[tuple[Any, ...]]) -> list[Returned]:
        stop()
        return [named(result) for result in call(name, calls)]

    return asked
