"""A trace of a few steps of a run, for xprof and TensorBoard; `jaxrl train --profile` writes one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class StepTrace:
    """Traces steps `first` to `last` of a run, counted as in metrics.jsonl.

    Args:
      steps: "10:13", or "10" for one.
      directory: where the trace is written.

    Raises:
      ValueError: for text that is not such a range.
    """

    def __init__(self, steps: str, directory: Path):
        found = re.fullmatch(r"(\d+)(?::(\d+))?", steps)
        self.first, self.last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= self.first <= self.last:
            raise ValueError(f"--profile is {steps!r}; give the first and the last step, such as 10:13")
        self.directory = directory
        self.parts: Any = None
        self.done = False

    def traced(self, parts: Any, offset: int) -> Callable[..., Any]:
        """The function that takes a step of these parts, and traces the requested steps.

        Args:
          parts: of a stage.
          offset: steps of the run before this stage.
        """

        def take(state: Any, *arguments: Any, **named: Any) -> Any:
            step = offset + int(state.step) + 1 if not self.done else 0
            if step == self.first:
                self.parts = parts
                jax.profiler.start_trace(self.directory)
            result = parts.step.run(state, *arguments, **named)
            if step == self.last and self.parts is not None:
                jax.block_until_ready(result[0])
                jax.profiler.stop_trace()
                self.done = True
            return result

        return take
