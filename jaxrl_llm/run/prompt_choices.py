"""The data of a stage, and the prompts of each step: in order, or chosen by a selection."""

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
      written: written rows by step; None for none.
    """

    def __init__(self, prompts: Any, written: Callable[[int], Experience] | None):
        self.prompts, self.written = prompts, written


def batch_of(prompts: Any, index: int, choices: list[Any], later: int) -> Any:
    """The prompts of a step: chosen by a selection, or by its index in the order."""
    return prompts.chosen(np.asarray(choices[later])) if choices else prompts[index + later]


def first_batch(prompts: Any, state: TrainState) -> Any:
    """The prompts of a state's first step, and their records."""
    return batch_of(prompts, int(state.step), choices_of(state), 0)


def choices_of(state: TrainState) -> list[Any]:
    """The pending choices in a state: for its step and the next one; None without a selection."""
    held = state.memory.get(SELECTION)
    return [] if held is None else [np.asarray(choice) for choice in held["choices"]]


def next_choices(choices: list[Any], state: TrainState) -> list[Any]:
    """Keep the choice made in a step, to be read after the step is over."""
    if not choices:
        return choices
    # A copy: the state will be donated to the next step.
    return [choices[1], jnp.copy(state.memory[SELECTION]["choices"][1])]
