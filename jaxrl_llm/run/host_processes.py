"""The processes of a run in which functions of the user's own are called: where they write, and that none is left."""

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
    """Functions of these compositions write into the run directory, stop with the run, and end with the block.

    Args:
      config: of the run.
      compositions: of its steps.
      stop: raises what the run wants to end with instead of waiting for an answer.
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
    """The caller of an environment, which looks before each turn whether the run wants to end instead."""
    if call is None:
        return None

    def asked(name: str, calls: Sequence[tuple[Any, ...]]) -> list[Returned]:
        stop()
        return call(name, calls)

    return asked
