"""One compiler: the parts of a step in their order become programs, cut where the host has to read or to ask.

A part is a pure function (state, work) -> what it adds to `work`, a dictionary of arrays that flows through the step;
`Host` parts run between programs, `Repeat` goes round its own parts. Where no part is a host's, all is one program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrl_llm.experience import TrainState
from jaxrl_llm.parallel.backend import compiler_options
from jaxrl_llm.parallel.rules import laid_out
from jaxrl_llm.training.placement import Placement

Work = dict[str, Any]


class Traced(NamedTuple):
    """A part inside a program.

    Attributes:
      name: for `explain` and messages.
      function: (state, work) -> what it adds to work.
    """

    name: str
    function: Callable[[TrainState, Work], Work]


class Host(NamedTuple):
    """A part that runs on the host.

    Attributes:
      name: for `explain` and messages.
      function: (state, work, context) -> what it adds to work.
      shapes: (state, work) -> the same as shapes, for a step that is explained or planned.
    """

    name: str
    function: Callable[[TrainState, Work, Any], Work]
    shapes: Callable[[TrainState, Work], Work]


class Repeat(NamedTuple):
    """Parts that go round while `work["carry"]` is unfinished; at least once."""

    parts: tuple[Any, ...]
    unfinished: Callable[[Any], Array]


class Learn(NamedTuple):
    """The last part: (state, work) -> (new state, numbers, rows). The state that it is given is used up."""

    name: str
    function: Callable[[TrainState, Work], tuple[TrainState, dict[str, Array], Any]]


@dataclass(frozen=True)
class Program:
    """Parts that were compiled together.

    Attributes:
      name: of its parts.
      run: the jitted function of (state, work): what its parts add to work, or with `last` (state, numbers, rows).
      last: it ends the step.
    """

    name: str
    run: Callable[..., Any]
    last: bool = False


class Loop(NamedTuple):
    """A loop whose rounds wait for the host; `goes_on` is a program that says whether there is another."""

    body: tuple[Any, ...]
    goes_on: Callable[..., Array]


Segment = Program | Host | Loop


def compiled(parts: Sequence[Any], placement: Placement, placed: Any) -> tuple[Segment, ...]:
    """Programs and host calls from parts in their order.

    Args:
      parts: `Traced`, `Host`, `Repeat`; `Learn` can be the last.
      placement: devices.
      placed: a sharding for each array of the state; None without a mesh.
    """
    segments: list[Segment] = []
    waiting: list[Traced] = []

    def flush(learn: Learn | None = None) -> None:
        if waiting or learn:
            segments.append(_program(tuple(waiting), learn, placement, placed))
            waiting.clear()

    for part in parts:
        if isinstance(part, Repeat) and _traceable(part):
            waiting.append(_inside(part))
        elif isinstance(part, Traced):
            waiting.append(part)
        elif isinstance(part, Learn):
            flush(part)
        elif isinstance(part, Repeat):
            flush()
            unfinished = part.unfinished
            goes_on = _jitted(lambda state, carry: unfinished(carry), placement)  # noqa: B023
            segments.append(Loop(compiled(part.parts, placement, placed), goes_on))
        else:
            flush()
            segments.append(part)
    flush()
    return tuple(segments)


def programs(segments: Sequence[Segment]) -> tuple[Program, ...]:
    """The compiled programs of a step in the order in which they first run."""
    found: list[Program] = []
    for segment in segments:
        if isinstance(segment, Program):
            found.append(segment)
        elif isinstance(segment, Loop):
            found += programs(segment.body)
    return tuple(found)


def run(segments: Sequence[Segment], state: TrainState, work: Work, context: Any) -> Any:
    """Run a step: (state, numbers, rows) where it ends in `Learn`, else its work."""
    result: Any = None
    for segment in segments:
        if isinstance(segment, Loop):
            more: Any = True
            while more:
                work = run(segment.body, state, work, context)
                more = bool(segment.goes_on(state, work["carry"]))
        elif isinstance(segment, Host):
            work = work | segment.function(state, work, context)
        elif segment.last:
            result = segment.run(state, work)
        else:
            work = work | segment.run(state, work)
    return work if result is None else result


def shapes(segments: Sequence[Segment], state: TrainState, work: Work) -> list[tuple[Program, Work]]:
    """The programs of a step with the work that each is called with, as shapes; the body of a loop is seen once."""
    return _shapes(segments, state, work)[0]


def _shapes(segments: Sequence[Segment], state: TrainState, work: Work) -> tuple[list[tuple[Program, Work]], Work]:
    seen: list[tuple[Program, Work]] = []
    for segment in segments:
        if isinstance(segment, Loop):
            inner, work = _shapes(segment.body, state, work)
            seen += inner
        elif isinstance(segment, Host):
            work = work | segment.shapes(state, work)
        else:
            seen.append((segment, work))
            if not segment.last:
                work = work | jax.eval_shape(segment.run, state, work)
    return seen, work


def _traceable(part: Any) -> bool:
    if isinstance(part, Repeat):
        return all(_traceable(inner) for inner in part.parts)
    return isinstance(part, Traced)


def _inside(part: Repeat) -> Traced:
    """A loop inside a program. What its parts add to work, beside the carry, is of one round and stays there."""

    def loop(state: TrainState, work: Work) -> Work:
        def one(carry: Any) -> Any:
            return _added(part.parts, state, work | {"carry": carry})["carry"]

        return {"carry": jax.lax.while_loop(part.unfinished, one, work["carry"])}

    return Traced("rounds", loop)


def _added(parts: Sequence[Traced], state: TrainState, work: Work) -> Work:
    """What parts that run one after the other add to work."""
    added: Work = {}
    for part in parts:
        added |= part.function(state, work | added)
    return added


def _program(parts: tuple[Traced, ...], learn: Learn | None, placement: Placement, placed: Any) -> Program:
    name = ", ".join(dict.fromkeys(part.name for part in (*parts, *([learn] if learn else []))))
    if learn is None:
        return Program(name, _jitted(lambda state, work: _added(parts, state, work), placement))

    def step(state: TrainState, work: Work) -> tuple[TrainState, dict[str, Array], Any]:
        return learn.function(state, work | _added(parts, state, work))

    mesh = placement.mesh
    # Numbers are on every device, and rows are where the program has put them.
    returned = None if mesh is None else (placed, NamedSharding(mesh, P()), None)
    return Program(name, _jitted(step, placement, donate_argnums=0, out_shardings=returned), last=True)


def _jitted(function: Callable, placement: Placement, **options: Any) -> Callable:
    """A compiled function, traced under the table of the mesh."""
    mesh = placement.mesh
    return jax.jit(laid_out(function, mesh, placement.rules), compiler_options=compiler_options(mesh), **options)
