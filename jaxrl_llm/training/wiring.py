"""Demand-driven wiring: what a function's parameter names say, and how the step obeys them.

A method's positional parameters are data, named after `Experience` fields (or after what the learner provides);
its keyword-only parameters are hyper-parameters. A positional parameter with default None is optional: it is
passed when something provides it and never computed for its own sake.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxrl_llm.experience import Experience, Method


@dataclass(frozen=True)
class Signature:
    """The names a function asks for.

    Attributes:
      required: data parameters without a default, in order.
      optional: data parameters that default to None.
      hyper: keyword-only parameters.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    hyper: tuple[str, ...]


def signature(function: Callable | Method) -> Signature:
    """Read a function's data and hyper-parameter names; for a `Method`, those of `update` after `memory`.

    >>> def scaled(rewards, weight=None, *, by=2.0): ...
    >>> signature(scaled)
    Signature(required=('rewards',), optional=('weight',), hyper=('by',))
    """
    stateful = isinstance(function, Method)
    parameters = list(inspect.signature(function.update if stateful else function).parameters.values())
    if stateful:
        parameters = parameters[1:]
    data = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return Signature(
        required=tuple(p.name for p in data if p.default is p.empty),
        optional=tuple(p.name for p in data if p.default is not p.empty),
        hyper=tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
    )


def names(function: Callable | Method) -> frozenset[str]:
    """Every data name that a function can use."""
    read = signature(function)
    return frozenset(read.required + read.optional)


def call(function: Callable | Method, provided: Mapping[str, Any], memory: Any = None) -> Any:
    """Call a function with the data it names; a `Method` gets its memory first and returns (value, memory)."""
    read = signature(function)
    data = {name: provided[name] for name in read.required}
    data |= {name: provided[name] for name in read.optional if provided.get(name) is not None}
    if isinstance(function, Method):
        return function.update(memory, **data)
    return function(**data)


def fields_of(experience: Experience) -> dict[str, Any]:
    """What an experience holds so far, by name."""
    held = {f.name: getattr(experience, f.name) for f in fields(experience) if f.name != "extras"}
    return {name: value for name, value in held.items() if value is not None} | experience.extras


def filled(experience: Experience, **values: Any) -> Experience:
    """The experience with more of it known: fields by their name, anything else in `extras`."""
    known = {f.name for f in fields(experience)}
    extras = {name: value for name, value in values.items() if name not in known}
    rest = {name: value for name, value in values.items() if name in known}
    return replace(experience, **rest, extras=experience.extras | extras)


def missing(function: Callable | Method, available: frozenset[str]) -> tuple[str, ...]:
    """Required names that nothing provides."""
    return tuple(name for name in signature(function).required if name not in available)


def nearest(name: str, choices) -> str:
    """A sentence fragment that suggests the closest known name, or lists what there is."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(choices))
