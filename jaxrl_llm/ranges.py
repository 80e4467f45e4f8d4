"""Types for numbers with a range, and the check of functions and dataclasses that use them.

    def scaled(rewards, *, share: Share = 0.5, eps: NonNegative = 1e-6): ...

Only Python numbers are checked; arrays and traced values are not. A plain `float` must be finite.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from jaxrl_llm.bounds import shown


@dataclass(frozen=True)
class Range:
    """An interval of allowed numbers: all finite numbers from `least` to `most`.

    Attributes:
      least, most: the endpoints.
      open: excluded endpoints: "" none, "(" the least, ")" the most, "()" both.
    """

    least: float = -math.inf
    most: float = math.inf
    open: str = ""

    def __contains__(self, value: Real) -> bool:
        try:
            number = float(value)
        except OverflowError:  # an integer too large for a float
            return False
        above = number > self.least if "(" in self.open else number >= self.least
        below = number < self.most if ")" in self.open else number <= self.most
        return above and below and math.isfinite(number)

    def __str__(self) -> str:
        left, right = ("(" if "(" in self.open else "["), (")" if ")" in self.open else "]")
        if self.most < math.inf:
            return f"lie in {left}{self.least:g}, {self.most:g}{right}"
        if self.least == -math.inf:
            return "be finite"
        return f"be finite and {'above' if '(' in self.open else 'at least'} {self.least:g}"


Positive = Annotated[float, Range(0, open="(")]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open="(")]
ShareBelowOne = Annotated[float, Range(0, 1, open=")")]
OpenShare = Annotated[float, Range(0, 1, open="()")]
AboveOne = Annotated[float, Range(1, open="(")]
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]

F = TypeVar("F", bound=Callable[..., Any])


def range_of(annotation: Any) -> Range | None:
    """The range in an annotation, also in a union with None or inside a tuple; None if there is none."""
    named = next((part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Range)), None)
    if named is not None or annotation is float:
        return named or Range()
    return next((found for part in get_args(annotation) if (found := range_of(part)) is not None), None)


def require_range(annotation: Any, value: Any, where: str) -> None:
    """Raise ValueError for a number, also in a list, that lies outside of the range of an annotation.

    Raises:
      ValueError: with `where`, the value, and the range.
    """
    named = range_of(annotation)
    if named is None:
        return
    for number in _numbers(value):
        if number not in named:
            several = isinstance(value, (list, tuple, Mapping))
            said = str(named) if not math.isfinite(number) else str(named).replace("finite and ", "")
            given = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{where} is {shown(given)}; {'its numbers' if several else 'it'} must {said}")


def ranged(function: F) -> F:
    """The function with a check of its keyword-only numbers against its annotations at each call."""

    @functools.cache
    def annotations() -> dict[str, Any]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}

    @functools.wraps(function)
    def checked(*data: Any, **named: Any) -> Any:
        known = annotations()
        for name, value in named.items():
            require_range(known.get(name), value, name)
        return function(*data, **named)

    return checked  # type: ignore[return-value]


def require_ranges(section: Any, owner: str) -> None:
    """Raise ValueError for a dataclass with a number outside of the range of its field.

    Raises:
      ValueError: with the field as `owner.name` (or its name alone), its value, and the range.
    """
    for name, annotation in _hints(type(section)).items():
        require_range(annotation, getattr(section, name, None), f"{owner}.{name}" if owner else name)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _numbers(value: Any) -> Iterator[Real]:
    if isinstance(value, Real) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)
