"""Credit: rewards -> advantages, by an ordered list of (field, function) that fills in more of the experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Method
from jaxrl_llm.training.wiring import call, fields_of

# What a credit function may fill in: one number a row, one a token, or either (a row's is spread over its tokens).
CREDIT_FIELDS = {
    "rewards": "row",
    "correct": "row",
    "weight": "row",
    "mask": "token",
    "token_rewards": "token",
    "advantages": "either",
    "token_weight": "either",
    "returns": "either",
}


@dataclass(frozen=True)
class CreditTerm:
    """One entry of a recipe's credit list.

    Attributes:
      field: the field of `Experience` that the function's value becomes (`CREDIT_FIELDS`).
      function: a function of experience fields, or a `Method`.
      name: for metrics, memory and messages.
    """

    field: str
    function: Callable[..., Any] | Method
    name: str = ""

    @property
    def memory_name(self) -> str:
        """Key of the method's memory in `TrainState.memory`."""
        return f"{self.field}:{self.name}"


def apply_credit(
    terms: Sequence[CreditTerm], experience: Experience, memory: dict[str, Any], step: Array
) -> tuple[Experience, dict[str, Any]]:
    """Run the list in order. Nothing here carries a gradient, and rows of weight 0 end with advantage 0."""
    memory = dict(memory)
    for term in terms:
        provided = fields_of(experience) | {"step": step}
        if isinstance(term.function, Method):
            value, memory[term.memory_name] = call(term.function, provided, memory[term.memory_name])
        else:
            value = call(term.function, provided)
        value = _checked(term, jax.lax.stop_gradient(jnp.asarray(value)), experience)
        if CREDIT_FIELDS[term.field] == "either" and value.ndim == 1:
            value = jnp.where(experience.mask > 0, value[:, None], 0.0)
        experience = replace(experience, **{term.field: value})
    if experience.advantages is not None:
        present = (experience.weight > 0)[:, None]
        experience = replace(experience, advantages=jnp.where(present, experience.advantages, 0.0))
    return experience, memory


def _checked(term: CreditTerm, value: Array, experience: Experience) -> Array:
    rows, width = experience.tokens.shape
    known: dict[str, list[tuple[int, ...]]] = {"row": [(rows,)], "token": [(rows, width)]}
    shapes = known.get(CREDIT_FIELDS[term.field], [(rows,), (rows, width)])
    if value.shape not in shapes:
        raise ValueError(
            f"{term.field} {term.name!r} returned shape {value.shape} for {rows} completions of {width} tokens; it "
            f"must return shape {' or '.join(map(str, shapes))}"
        )
    return value
