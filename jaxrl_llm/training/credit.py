"""Credit: rewards -> advantages, by an ordered list of (field, function) that fills in more of the experience."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Method
from jaxrl_llm.training.wiring import call, fields_of, filled, names

# Shapes of the fields of `Experience` that a credit function may fill in: one number a row, one a token, or either (a
# row's is spread over its tokens). Any other name becomes an entry of `Experience.extras`, with one entry a row.
CREDIT_FIELDS = {
    "rewards": "row",
    "correct": "row",
    "weight": "row",
    "mask": "token",
    "token_rewards": "token",
    "advantages": "either",
    "token_weight": "either",
    "returns": "either",
    "turn": "token",
    "global_advantages": "either",
}

# A credit function that names this is evaluated inside the chunked pass over the vocabulary.
VOCABULARY = "log_probabilities"


@dataclass(frozen=True)
class CreditTerm:
    """One entry of a recipe's credit list.

    Attributes:
      field: the field of `Experience` that the function's value becomes (`CREDIT_FIELDS`), or a new name.
      function: a function of experience fields, or a `Method`.
      name: for metrics, memory and messages.
    """

    field: str
    function: Callable[..., Any] | Method
    name: str = ""

    @property
    def over_vocabulary(self) -> bool:
        """Whether the function reads whole next-token distributions of the policy before the update."""
        return VOCABULARY in names(self.function)

    @property
    def memory_name(self) -> str:
        """Key of the method's memory in `TrainState.memory`."""
        return f"{self.field}:{self.name}"


def apply_credit(
    terms: Sequence[CreditTerm],
    experience: Experience,
    memory: dict[str, Any],
    step: Array,
    over_vocabulary: Mapping[int, Array],
) -> tuple[Experience, dict[str, Any]]:
    """Run the list in order. Nothing here carries a gradient, and rows of weight 0 end with advantage 0.

    Args:
      terms: the list.
      experience: a batch with rewards and with whatever the terms name.
      memory: of the methods that remember something.
      step: updates made so far.
      over_vocabulary: values of the terms that read whole distributions, by their place in the list.
    """
    memory = dict(memory)
    for index, term in enumerate(terms):
        provided = fields_of(experience) | {"step": step}
        if index in over_vocabulary:
            value = over_vocabulary[index]
        elif isinstance(term.function, Method):
            value, memory[term.memory_name] = call(term.function, provided, memory[term.memory_name])
        else:
            value = call(term.function, provided)
        value = _checked(term, jax.lax.stop_gradient(jnp.asarray(value)), experience)
        if CREDIT_FIELDS.get(term.field) == "either" and value.ndim == 1:
            value = jnp.where(experience.mask > 0, value[:, None], 0.0)
        experience = filled(experience, **{term.field: value})
    if experience.advantages is not None:
        present = (experience.weight > 0)[:, None]
        experience = replace(experience, advantages=jnp.where(present, experience.advantages, 0.0))
    return experience, memory


def _checked(term: CreditTerm, value: Array, experience: Experience) -> Array:
    rows, width = experience.tokens.shape
    if term.field not in CREDIT_FIELDS:
        if value.ndim == 0 or value.shape[0] != rows:
            raise ValueError(
                f"{term.field} {term.name!r} returned shape {value.shape} for {rows} completions; its first axis must "
                f"have one entry a completion, {rows}"
            )
        return value
    known: dict[str, list[tuple[int, ...]]] = {"row": [(rows,)], "token": [(rows, width)]}
    shapes = known.get(CREDIT_FIELDS[term.field], [(rows,), (rows, width)])
    if value.shape not in shapes:
        raise ValueError(
            f"{term.field} {term.name!r} returned shape {value.shape} for {rows} completions of {width} tokens; it "
            f"must return shape {' or '.join(map(str, shapes))}"
        )
    return value
