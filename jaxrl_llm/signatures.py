"""Reading the parameter names of functions, and calling functions with the data that they name.

The positional parameters of a method are data, named after entries of `jaxrl_llm.fields`; its keyword-only parameters
are hyper-parameters. A positional parameter with default None is optional: it is passed if something else provides it,
and never computed only for this parameter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

from jaxrl_llm.experience import Method
from jaxrl_llm.fields import TEXT, is_written_text


@dataclass(frozen=True)
class Signature:
    """The parameter names of a function.

    Attributes:
      required: data parameters without a default, in order.
      optional: data parameters that default to None.
      hyper: keyword-only parameters.
      anything: whether it takes `**kwargs`.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    hyper: tuple[str, ...]
    anything: bool = False


def signature(function: Callable | Method) -> Signature:
    """Read a function's data and hyper-parameter names; for a `Method`, those of `update` after `memory`.

    >>> def scaled(rewards, weight=None, *, by=2.0): ...
    >>> signature(scaled)
    Signature(required=('rewards',), optional=('weight',), hyper=('by',), anything=False)
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
        anything=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def names(function: Callable | Method) -> frozenset[str]:
    """Every data name that a function can use."""
    read = signature(function)
    return frozenset(read.required + read.optional)


def required(functions: Iterable[Callable | Method]) -> frozenset[str]:
    """Every name that at least one of the functions requires."""
    return frozenset().union(*(signature(function).required for function in functions))


def call(function: Callable | Method, provided: Mapping[str, Any], memory: Any = None) -> Any:
    """Call a function with the data it names; a `Method` gets its memory first and returns (value, memory)."""
    read = signature(function)
    data = {name: provided[name] for name in read.required}
    data |= {name: provided[name] for name in read.optional if provided.get(name) is not None}
    if isinstance(function, Method):
        return function.update(memory, **data)
    return function(**data)


def renamed(function: Callable | Method, /, **other: str) -> Any:
    """The function with other data names: renamed(kl_estimate, reference_logprobs="teacher_logprobs").

    Args:
      function: of named data, or a `Method`.
      other: name of its parameter -> name of the data to pass. Several parameters may get the same data.

    Raises:
      ValueError: for an unknown parameter, and for data with the name of a hyper-parameter.
    """
    if isinstance(function, Method):
        return Method(function.init, renamed(function.update, **other))
    declared = inspect.signature(function)
    if unknown := sorted(other.keys() - declared.parameters.keys()):
        known = [name for name, p in declared.parameters.items() if p.kind is not p.KEYWORD_ONLY]
        raise ValueError(f"{name_of(function)} reads no {unknown[0]!r}; it reads {', '.join(known)}")
    readers: dict[str, list[str]] = {}
    for name in declared.parameters:
        readers.setdefault(other.get(name, name), []).append(name)
    parameters = []
    for name, ones in readers.items():
        of = [declared.parameters[one] for one in ones]
        if len(of) > 1 and any(p.kind is p.KEYWORD_ONLY for p in of):
            raise ValueError(f"{name_of(function)} has a hyper-parameter {name!r}; its data needs another name")
        parameters.append(min(of, key=_optional).replace(name=name))  # required if one of them is
    parameters.sort(key=lambda p: (p.kind, _optional(p)))

    def reading_others(*args: Any, **data: Any) -> Any:
        # Data with the own name of a parameter that reads other data is not for it, also with `**kwargs`.
        passed = {
            one: value for name, value in data.items() for one in readers.get(name, () if name in other else (name,))
        }
        return function(*args, **passed)

    update_wrapper(reading_others, function)
    reading_others.__signature__ = declared.replace(parameters=parameters)  # type: ignore[attr-defined]
    reading_others.__name__ = name_of(function)
    return reading_others


def _optional(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty


def missing(function: Callable | Method, available: Collection[str]) -> tuple[str, ...]:
    """Required names that nothing provides."""
    return tuple(name for name in signature(function).required if name not in available)


def name_of(function: Any) -> str:
    """The name of a function in messages and metrics."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, Method):
        function = function.update
    return getattr(function, "__name__", type(function).__name__).lstrip("_")


_PER_ROW = frozenset(name for name in TEXT if f"{name}s" in TEXT)


def on_host(function: Callable | Method) -> bool:
    """Whether a function is a reading: it has a text parameter (`completions`, `verdict_text`, ...), takes `**kwargs`,
    is `async def`, or is decorated with `reading`."""
    target = function
    while isinstance(target, partial):
        target = target.func
    if isinstance(target, Method):
        return False
    marked = getattr(target, "_reads_on_host", False) or inspect.iscoroutinefunction(target)
    read = signature(function)
    return bool(marked or read.anything or any(name in TEXT or is_written_text(name) for name in names(function)))


def per_row(function: Callable) -> bool:
    """Whether a reading is called for one row at a time: it has a text parameter in the singular."""
    return bool(names(function) & _PER_ROW)


def declared_widths(function: Callable) -> tuple[int, ...]:
    """Sizes of the axes after the row axis in a function's return annotation; () for one number per row, or no
    annotation.

    A size is a number or the name of a keyword:

    >>> def counts(completions, *, buckets=8) -> 'Float[np.ndarray, "B buckets"]': ...
    >>> declared_widths(partial(counts, buckets=4))
    (4,)
    """
    declared = inspect.signature(function)
    found = re.search(r"""["']B ([\w ]+)["']""", str(declared.return_annotation))
    if found is None:
        return ()
    sizes = []
    for size in found[1].split():
        parameter = declared.parameters.get(size)
        sizes.append(int(size) if parameter is None else int(parameter.default))
    return tuple(sizes)


def reading(function: Callable) -> Callable:
    """Mark a function of arrays that must run on the host, because it calls a service or keeps its own state.

    It is called with NumPy arrays, between two compiled programs.
    """
    function._reads_on_host = True  # type: ignore[attr-defined]
    return function
