"""The processes that call users' functions: their log directory, and their end with the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxrl_llm.config import Config
from jaxrl_llm.reporting.shares import own_folder
from jaxrl_llm.rewards import Guarded
from jaxrl_llm.rollout.host_calls import Caller, Returned

LOGS = "logs"  # subfolder of output and tracebacks of users' functions


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
    logs = own_folder(config.directory, jax.process_index()) / LOGS
    for function in functions:
        function.close()  # a process of the test call before the run, which had no log directory
        function.folder = logs
        function.place = f"{config.place}/{logs.relative_to(config.directory).as_posix()}"
        function.most_failed = config.faults.most_failed_share
        function.stop = stop
    try:
        yield
    finally:
        for function in functions:
            function.close()


def attentive(call: Caller | None, stop: Callable[[], None]) -> Caller | None:
    """A caller of an environment that calls `stop` before each turn."""
    if call is None:
        return None

    def asked(name: str, calls: Sequence[tuple[Any, ...]]) -> list[Returned]:
        stop()
        return call(name, calls)

    return asked
