"""From what `make_train_step` is given to a composition: functions and pairs become terms; what is neither is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import optax

from jaxrl_llm.experience import Method
from jaxrl_llm.models.model import Model
from jaxrl_llm.signatures import name_of
from jaxrl_llm.training.composition import Composition, Fill, LossTerm, Resources, Reward, Source, Update


def reward_term(term: Reward | Callable[..., Any] | tuple[Callable[..., Any], float]) -> Reward:
    """A reward function, or (function, weight), as a term."""
    if isinstance(term, Reward):
        return term if term.name else replace(term, name=name_of(term.function))
    function, weight = term if _is_pair(term) else (term, 1.0)
    if not callable(function) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"rewards holds {term!r}; give a function, (function, weight), or a Reward")
    return Reward(function, float(weight), name_of(function))


def fill_term(term: Fill | tuple[Any, Any]) -> Fill:
    """A (name or names, function) pair as a term."""
    if isinstance(term, Fill):
        return term if term.name else replace(term, name=name_of(term.function))
    names, function = term if _is_pair(term) else (None, None)
    listed = (names,) if isinstance(names, str) else names
    made = callable(function) or isinstance(function, Method)
    if not made or not isinstance(listed, tuple) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"credit holds {term!r}; give (name, function), ((name, name), function), or a Fill")
    return Fill(names, function, name_of(function))


def loss_term(term: Any) -> LossTerm:
    """A loss function, or (function, coefficient), as a term."""
    if isinstance(term, LossTerm):
        return term if term.name else replace(term, name=name_of(term.function))
    function, coefficient = term if _is_pair(term) else (term, 1.0)
    if not callable(function) or not (
        callable(coefficient) or isinstance(coefficient, (Real, Method)) or hasattr(coefficient, "dtype")
    ):
        raise ValueError(f"losses holds {term!r}; give a function, (function, coefficient), or a LossTerm")
    return LossTerm(function, coefficient, name_of(function))


def _is_pair(term: Any) -> bool:
    return isinstance(term, (tuple, list)) and len(term) == 2 and not isinstance(term, Method)


def _terms(name: str, listed: Any, made: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(listed, (list, tuple)) or isinstance(listed, Method):
        raise ValueError(f"{name} is {listed!r}; give a list, of one entry too")
    return tuple(map(made, listed))


def composition_of(
    model: Model,
    optimizer: optax.GradientTransformation,
    source: Source | Sequence[Source],
    rewards: Sequence[Any],
    credit: Sequence[Any],
    losses: Sequence[Any],
    update: Update | None,
    resources: Resources | None,
) -> Composition:
    """A composition, not checked yet, from what `make_train_step` is given."""
    return Composition(
        model,
        optimizer,
        tuple(source) if isinstance(source, Sequence) else (source,),
        _terms("rewards", rewards, reward_term),
        _terms("credit", credit, fill_term),
        _terms("losses", losses, loss_term),
        update or Update(),
        resources or Resources(),
    )
