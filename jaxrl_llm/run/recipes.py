"""Recipes: names and hyper-parameters in YAML -> the functions of a step.

An entry is a name, `{name: {hyper-parameter: value}}`, or `{python: "module:function", hyper-parameter: value}` for a
user's function. A name is a public name of one of the packages below; there is no registry.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import pydantic

from jaxrl_llm import advantages, losses, rewards, schedules, selection
from jaxrl_llm.bounds import shortened, shown
from jaxrl_llm.fields import nearest
from jaxrl_llm.ranges import Positive, require_range
from jaxrl_llm.signatures import on_host, renamed, signature
from jaxrl_llm.terms import Fill, LossTerm, Reward

CREDIT_ROOMS = (advantages, selection, rewards, losses, schedules)
COEFFICIENT_ROOMS = (schedules, losses, advantages)


class RecipeError(ValueError):
    """A recipe entry with an unknown name, an unknown hyper-parameter or a value that is not allowed."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


class ModuleMissing(RecipeError):
    """A module of the user that cannot be imported here."""


# Options of a call on the host (a reading), written next to the hyper-parameters of a reward or a fill.
_CALLING = {"deadline_s": Optional[Positive], "value_on_failure": float | None}  # noqa: UP045
_PROCESS = ("executor", "memory_gib")
_OF_REWARDS = ("weight", "name", *_CALLING, *_PROCESS)
_OF_CREDIT = ("name", *_CALLING, *_PROCESS)
_OF_LOSSES = ("name", "coefficient")


def reward_terms(entries: Sequence[Any], sizes: Mapping[str, Any] | None = None) -> tuple[Reward, ...]:
    """Rewards of the entries of section `rewards`.

    Next to the hyper-parameters an entry may have `weight`, `name`, `deadline_s`, `value_on_failure`, `executor` and
    `memory_gib`.
    """
    terms = []
    for entry in entries:
        name, hyper = entry_of(entry, "rewards")
        weight, label = hyper.pop("weight", 1.0), hyper.pop("name", None)
        calling = _calling(hyper, f"rewards.{name}")
        process = {key: hyper.pop(key) for key in _PROCESS if key in hyper}
        function = method(name, hyper, (rewards,), "rewards", sizes, _OF_REWARDS)
        if hasattr(function, "written_view"):
            function = renamed(function, verdict_text=f"{verdict_of(label or _label(name))}_text")
        function = _in_process(function, name, label or _label(name), f"rewards.{name}", **process)
        terms.append(Reward(function, _number(weight, f"rewards.{name}.weight"), label or _label(name), **calling))
    return tuple(terms)


def verdict_of(reward: str) -> str:
    """The name of the view in which a network of the run generates the verdict of a reward."""
    return f"{reward}_verdict"


def credit_terms(entries: Sequence[Mapping[str, Any]], sizes: Mapping[str, Any] | None = None) -> tuple[Fill, ...]:
    """Fills of the entries of section `credit`.

    An entry is `field: method`, or `"[field, field]": method` for a function that returns several fields, in order.
    """
    terms = []
    for entry in entries:
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise RecipeError(
                f"credit entry {shown(entry)} must be one `field: method`, e.g. advantages: group_normalized"
            )
        ((field, inner),) = entry.items()
        name, hyper = entry_of(inner, f"credit.{field}")
        label = hyper.pop("name", None)
        calling = _calling(hyper, f"credit.{field}.{name}")
        process = {key: hyper.pop(key) for key in _PROCESS if key in hyper}
        filled = _filled(field)
        function = method(name, hyper, CREDIT_ROOMS, f"credit.{field}", sizes, _OF_CREDIT)
        function = _in_process(function, name, label or _label(name), f"credit.{field}.{name}", **process)
        terms.append(Fill(filled, function, label or _label(name), **calling))
    return tuple(terms)


def _in_process(
    function: Any, name: str, label: str, where: str, executor: str | None = None, memory_gib: float | None = None
) -> Any:
    """A user's function that reads text, wrapped for a separate process if it can be pickled; others unchanged."""
    if executor not in (None, "process", "sandbox", "thread"):
        raise RecipeError(f"{where}.executor is {shown(executor)}; it must be 'process', 'sandbox' or 'thread'")
    if ":" not in name or not on_host(function) or executor == "thread":
        if executor in ("process", "sandbox") or memory_gib is not None:
            raise RecipeError(
                f"{where} is not a function of yours that reads text, so it runs in the main process; remove executor "
                "and memory_gib"
            )
        return function
    if memory_gib is not None and not _number(memory_gib, f"{where}.memory_gib") > 0:
        raise RecipeError(f"{where}.memory_gib is {memory_gib}; it must be above 0")
    try:
        memory = None if memory_gib is None else int(float(memory_gib) * 2**30)
        return rewards.Guarded(function, label, memory, isolated=executor == "sandbox")
    except Exception as error:  # pickle may raise any exception
        if executor is not None:
            raise RecipeError(f"{where} cannot be called in a process: {error}; use executor: thread") from error
        return function


def _filled(field: Any) -> str | tuple[str, ...]:
    """The field that an entry of credit fills, or the fields: `a, b` or `[a, b]`."""
    names = tuple(part.strip() for part in str(field).strip("[]").split(","))
    return names if len(names) != 1 else str(field).strip("[] ")


def loss_terms(entries: Sequence[Any], sizes: Mapping[str, Any] | None = None) -> tuple[LossTerm, ...]:
    """Loss terms of the entries of section `losses`.

    Next to the hyper-parameters an entry may have `name` and `coefficient` (a number, or an entry with a schedule).
    """
    terms = []
    for entry in entries:
        name, hyper = entry_of(entry, "losses")
        coefficient, label = hyper.pop("coefficient", 1.0), hyper.pop("name", None)
        coefficient = number_or_method(coefficient, f"losses.{name}.coefficient", sizes)
        if isinstance(coefficient, float) and coefficient < 0:
            raise RecipeError(
                f"losses.{name}.coefficient is {coefficient}; every loss is minimised, so the coefficient must be at "
                "least 0"
            )
        function = method(name, hyper, (losses,), "losses", sizes, _OF_LOSSES)
        terms.append(LossTerm(function, coefficient, label or _label(name)))
    return tuple(terms)


def number_or_method(entry: Any, where: str, sizes: Mapping[str, Any] | None = None) -> Any:
    """A number, or the function or `Method` that an entry names."""
    named = isinstance(entry, str) and (entry.isidentifier() or ":" in entry)
    if not named and not isinstance(entry, Mapping):
        return _number(entry, where)
    name, hyper = entry_of(entry, where)
    return method(name, hyper, COEFFICIENT_ROOMS, where, sizes)


def method(
    name: str,
    hyper: Mapping[str, Any],
    rooms: Sequence[ModuleType],
    where: str,
    sizes: Mapping[str, Any] | None = None,
    beside: Sequence[str] = (),
) -> Any:
    """The function that an entry names, with its hyper-parameters bound.

    A function without data parameters is a factory: it is called, and its result is the method. A hyper-parameter that
    the entry does not set, that has no default or the default None, and that has the name of a size of the run
    (`sizes`) gets that size. With `reads: {reference_logprobs: teacher_logprobs}` next to the hyper-parameters, the
    function reads another field instead of the one that its parameter names. `beside` are the keys that an entry may
    have next to hyper-parameters, for messages.

    Raises:
      RecipeError: for an unknown name or hyper-parameter (with the nearest known one), or a value of the wrong type.
    """
    hyper, other = dict(hyper), {}
    if "reads" in hyper:
        other = hyper.pop("reads")
        pairs = other.items() if isinstance(other, Mapping) else [(other, None)]
        if not all(isinstance(word, str) and word.isidentifier() for pair in pairs for word in pair):
            raise RecipeError(
                f"{where}.{name}.reads is {shown(other)}; write {{parameter of the function: field to read}}"
            )
    function = user_function(name, where) if ":" in name else _public_function(name, rooms, where)
    read = signature(function)
    for key in hyper:
        if key not in read.hyper:
            known = {*read.hyper, *beside, "reads"} - (set() if ":" in name else {*_PROCESS})
            raise RecipeError(f"{where}.{name}.{key} is not a hyper-parameter of {name}; {nearest(key, sorted(known))}")
    bound = {key: _typed(function, key, value, f"{where}.{name}.{key}") for key, value in hyper.items()}
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    bound |= {
        p.name: sizes[p.name]
        for p in keywords
        if sizes and p.name in sizes and p.name not in bound and (p.default is p.empty or p.default is None)
    }
    required = [p.name for p in keywords if p.default is p.empty and p.name not in bound]
    if required:
        raise RecipeError(f"{where}.{name} needs {required[0]}; add {name}: {{{required[0]}: ...}}")
    try:
        made = function(**bound) if not (read.required or read.optional) else partial(function, **bound)
        if made is None or isinstance(made, str | bytes | list | dict):
            raise RecipeError(f"{where}.{name} takes no data and returned {shown(made)}; it must return a function")
        if other:
            return renamed(made, **other)
    except ValueError as error:
        raise RecipeError(f"{where}.{name}: {error}") from None
    return made if bound or not (read.required or read.optional) else function


def _public_function(name: str, rooms: Sequence[ModuleType], where: str) -> Callable:
    for room in rooms:
        if name in room.__all__ and inspect.isfunction(getattr(room, name)):
            return getattr(room, name)
    known = [n for room in rooms for n in room.__all__ if inspect.isfunction(getattr(room, n))]
    raise RecipeError(f"{where} names {shown(name)}, which does not exist; {nearest(name, known)}")


def user_function(path: str, where: str) -> Callable:
    """The function at `module:function`; the module may be a file in the current directory.

    Raises:
      RecipeError: if the module cannot be imported or has no such function.
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise RecipeError(f"{where} names python: {shown(path)}; write it as module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ModuleMissing(
            f"{where} names python: {path!r}, but importing {module_name!r} failed: {error}; modules are searched in "
            "the current directory and on PYTHONPATH, so give the command in the directory of the module, or set "
            "PYTHONPATH to it"
        ) from error
    except AttributeError:
        raise RecipeError(f"{where} names python: {path!r}, but {module_name!r} has no {attribute!r}") from None
    except Exception as error:  # the user's module may raise any exception
        raise RecipeError(f"{where} names python: {path!r}, but importing {module_name!r} failed: {error!r}") from error
    if not callable(function):
        raise RecipeError(f"{where} names python: {path!r}, which is not a function")
    return function


def entry_of(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(name, hyper-parameters) of an entry: a name, {name: {hyper-parameters}}, or {python: "module:function", ...}.

    Raises:
      RecipeError: for anything else.
    """
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and "python" in entry:
        if ":" not in str(entry["python"]):
            module, _, function = str(entry["python"]).rpartition(".")
            near = f"; did you mean {module}:{function}?" if module else ""
            raise RecipeError(f"{where} names python: {shown(entry['python'])}; write it as module:function{near}")
        return str(entry["python"]), {key: value for key, value in entry.items() if key != "python"}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, hyper),) = entry.items()
        if hyper is None or isinstance(hyper, Mapping):
            return str(name), dict(hyper or {})
    raise RecipeError(
        f"{where} entry {shown(entry)} is neither a name, nor {{name: {{hyper-parameters}}}}, nor {{python: ...}}"
    )


def _label(name: str) -> str:
    return name.rpartition(":")[2]


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{where} is {shown(value)}; it must be a number") from None
    if not math.isfinite(number):
        raise RecipeError(f"{where} is {number}; it must be finite")
    return number


def _typed(function: Callable, key: str, value: Any, where: str) -> Any:
    """A value, checked against the annotation of the function if there is one."""
    try:
        annotation = inspect.signature(function, eval_str=True).parameters[key].annotation
    except NameError:  # a user's module may import names only for the type checker
        return value
    return value if annotation is inspect.Parameter.empty else checked(annotation, value, where)


def _calling(hyper: dict[str, Any], where: str) -> dict[str, Any]:
    """The options of a call on the host, removed from the hyper-parameters."""
    return {key: checked(kind, hyper.pop(key), f"{where}.{key}") for key, kind in _CALLING.items() if key in hyper}


def checked(annotation: Any, value: Any, where: str) -> Any:
    """A value of the annotated type; RecipeError names the key otherwise."""
    try:
        typed = pydantic.TypeAdapter(annotation).validate_python(value)
        require_range(annotation, typed, where)
        return typed
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where} is {shown(value)}: {error.errors()[0]['msg'].lower()}") from None
    except pydantic.errors.PydanticSchemaGenerationError:
        return value
    except ValueError as error:
        raise RecipeError(str(error)) from None
