"""The processes that call users' functions: their log directory, and their end with the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxrl_llm.config import Config
from jaxrl_llm.reporting.shares import OWN
from jaxrl_llm.rewards import Guarded
from jaxrl_llm.rollout.host_calls import Caller, Returned


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
    own = f"{OWN}/{jax.process_index()}" if jax.process_count() > 1 else OWN
    for function in functions:
        function.close()  # where it was tried before the run directory was there
        function.folder, function.place = config.directory / own, f"{config.place}/{own}"
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
