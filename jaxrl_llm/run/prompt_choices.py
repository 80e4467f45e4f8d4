"""The data of a stage, and which prompts a step gets: in order, or as a selection with memory has chosen them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.experience import Experience, TrainState
from jaxrl_llm.training.collect import SELECTION


class StageData:
    """The rows of a stage by step.

    Attributes:
      prompts: batches of prompts; None where all rows are written.
      written: rows that are handed to a step, by step; None where there are none.
    """

    def __init__(self, prompts: Any, written: Callable[[int], Experience] | None):
        self.prompts, self.written = prompts, written


def batch_of(prompts: Any, index: int, choices: list[Any], later: int) -> Any:
    """The prompts of a step: those that a selection has chosen for it, or those of its place in the order."""
    return prompts.chosen(np.asarray(choices[later])) if choices else prompts[index + later]


def first_batch(prompts: Any, state: TrainState) -> Any:
    """The prompts of a state's first step, and their records."""
    return batch_of(prompts, int(state.step), choices_of(state), 0)


def choices_of(state: TrainState) -> list[Any]:
    """The choices of prompts that wait in a state: those of its step and of the one behind it; none without."""
    held = state.memory.get(SELECTION)
    return [] if held is None else [np.asarray(choice) for choice in held["choices"]]


def next_choices(choices: list[Any], state: TrainState) -> list[Any]:
    """After a step: the choice made in it is read when it is needed, when the step is over."""
    if not choices:
        return choices
    # The state will be used up by the next step; what was chosen has to outlive it.
    return [choices[1], jnp.copy(state.memory[SELECTION]["choices"][1])]
