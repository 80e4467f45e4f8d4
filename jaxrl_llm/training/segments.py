"""Compilation of a step: consecutive parts become programs, separated by the parts that run on the host.

A part is a pure function (state, work) -> additions to `work`, a dictionary of arrays that is passed through the step;
`Host` parts run between programs, `Repeat` loops over its own parts. Without host parts the whole step is one program.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import TrainState
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.backend import compiler_options
from jaxrl_llm.parallel.placement import shardings, state_shardings
from jaxrl_llm.parallel.rules import RULES, Rules, changed_rules, laid_out
from jaxrl_llm.training.networks import POLICY

Work = dict[str, Any]


class Traced(NamedTuple):
    """A part inside a program.

    Attributes:
      name: for `explain` and messages.
      function: (state, work) -> additions to work.
    """

    name: str
    function: Callable[[TrainState, Work], Work]


class Host(NamedTuple):
    """A part that runs on the host.

    Attributes:
      name: for `explain` and messages.
      function: (state, work, context) -> additions to work.
      shapes: (state, work) -> the additions as shapes, for `explain` and `plan`.
    """

    name: str
    function: Callable[[TrainState, Work, Any], Work]
    shapes: Callable[[TrainState, Work], Work]


class Repeat(NamedTuple):
    """Parts that are repeated while `work["carry"]` is unfinished; at least once."""

    parts: tuple[Any, ...]
    unfinished: Callable[[Any], Array]


class Learn(NamedTuple):
    """The last part: (state, work) -> (new state, metrics, rows). It donates the given state."""

    name: str
    function: Callable[[TrainState, Work], tuple[TrainState, dict[str, Array], Any]]


@dataclass(frozen=True)
class Program:
    """Parts that are compiled together.

    Attributes:
      name: of its parts.
      run: the jitted function of (state, work) -> additions of its parts to work, or with `last` (state, metrics,
          rows).
      last: whether it ends the step.
    """

    name: str
    run: Callable[..., Any]
    last: bool = False


class Loop(NamedTuple):
    """A loop on the host; the program `goes_on` decides whether there is another round."""

    body: tuple[Any, ...]
    goes_on: Callable[..., Array]


Segment = Program | Host | Loop


def compiled(parts: Sequence[Any], placement: Placement, placed: Any) -> tuple[Segment, ...]:
    """Programs and host calls from parts, in order.

    Args:
      parts: `Traced`, `Host`, `Repeat`; the last may be `Learn`.
      placement: devices and shardings.
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
    """The compiled programs of a step, in the order of their first run."""
    found: list[Program] = []
    for segment in segments:
        if isinstance(segment, Program):
            found.append(segment)
        elif isinstance(segment, Loop):
            found += programs(segment.body)
    return tuple(found)


def run(segments: Sequence[Segment], state: TrainState, work: Work, context: Any) -> Any:
    """Run a step: returns (state, metrics, rows) if it ends with `Learn`, else its work.

    The state is unchanged until the last program; `context.stop` may raise before each segment.
    """
    result: Any = None
    for segment in segments:
        context.stop()
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
    """The programs of a step with the shapes of the work passed to each; the body of a loop occurs once."""
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
    """A loop inside a program. Additions of its parts to work, except the carry, are discarded after each round."""

    def loop(state: TrainState, work: Work) -> Work:
        def one(carry: Any) -> Any:
            return _added(part.parts, state, work | {"carry": carry})["carry"]

        return {"carry": jax.lax.while_loop(part.unfinished, one, work["carry"])}

    return Traced("rounds", loop)


def _added(parts: Sequence[Traced], state: TrainState, work: Work) -> Work:
    """The additions of consecutive parts to work."""
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
    # Metrics are replicated, rows keep the sharding of the program.
    returned = None if mesh is None else (placed, NamedSharding(mesh, P()), None)
    return Program(name, _jitted(step, placement, donate_argnums=0, out_shardings=returned), last=True)


def _jitted(function: Callable, placement: Placement, **options: Any) -> Callable:
    """A jitted function, traced under the sharding rules of the mesh."""
    mesh = placement.mesh
    return jax.jit(laid_out(function, mesh, placement.rules), compiler_options=compiler_options(mesh), **options)


# ---- where arrays are ------------------------------------------------------------------------------------------------

# Names, for configs, of the arrays that can be in host memory between uses.
OFFLOADABLE = ("optimizer", "reference")


@dataclass(frozen=True)
class Placement:
    """Devices of a step, and the sharding of its arrays.

    Attributes:
      mesh: the devices; None leaves placement to jax.
      rules: mapping from the names of array axes to mesh axes.
      gather_for_rollout: gather parameters sharded over `fsdp` once per rollout; otherwise once per token.
      offload: arrays in host memory between uses, of `OFFLOADABLE`. Needs a mesh.
    """

    mesh: Mesh | None = None
    rules: Rules = field(default_factory=lambda: RULES)
    gather_for_rollout: bool = True
    offload: frozenset[str] = frozenset()


def parameter_shardings(model: Model, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """A sharding for each parameter; replicated for a model without parameter specs.

    Raises:
      ValueError: if the mesh does not divide an axis that it must divide.
    """
    if model.specs is not None:
        return shardings(model.specs, mesh, changed_rules(model.rules, rules) if model.rules else rules)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: NamedSharding(mesh, P()), params)


def placed_state(
    models: Mapping[str, Model], state: PyTree, mesh: Mesh, rules: Rules = RULES, *, offload: Collection[str] = ()
) -> PyTree:
    """A sharding for each array of a training state.

    Args:
      models: models of the networks by name; the default is the policy's.
      state: arrays or their shapes.
      mesh: the devices.
      rules: the sharding rules.
      offload: of `OFFLOADABLE`.
    """
    tables = {}
    for name, model in models.items():
        tables[name] = (jax.eval_shape(model.init, jax.random.key(0)), parameter_shardings(model, mesh, rules))

    def placed_like(name: str, tree: PyTree) -> PyTree:
        params, lies = tables.get(name, tables[POLICY])
        return state_shardings(tree, params, lies, mesh)

    placed = placed_like(POLICY, state)
    networks = {name: placed_like(name, network) for name, network in state.networks.items()}
    host = lambda path, s: s.with_memory_kind("pinned_host") if is_offloaded(path, offload) else s  # noqa: E731
    return jax.tree_util.tree_map_with_path(host, replace(placed, networks=networks))


def is_offloaded(path: Any, offload: Collection[str]) -> bool:
    """Whether an array of a training state belongs to one of these names of `OFFLOADABLE`."""
    names = tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path[:3])
    meant = {"optimizer": ("networks", POLICY, "optimizer_state"), "reference": ("networks", "reference", "params")}
    return names in [meant[name] for name in offload]


def in_device_memory(state: TrainState, placed: TrainState | None, offload: Collection[str]) -> TrainState:
    """Inside a program: the state with these offloaded parts copied to device memory."""
    if placed is None or not offload:
        return state

    def used(path: Any, x: Array, s: NamedSharding) -> Array:
        return jax.device_put(x, s.with_memory_kind("device")) if is_offloaded(path, offload) else x

    return jax.tree_util.tree_map_with_path(used, state, placed)


def put_back(state: TrainState, placed: TrainState | None) -> TrainState:
    """Inside a program: the state with offloaded parts copied back to host memory."""
    if placed is None:
        return state

    def put(x: Array, s: NamedSharding) -> Array:
        return jax.device_put(x, s) if s.memory_kind == "pinned_host" else jax.lax.with_sharding_constraint(x, s)

    return jax.tree.map(put, state, placed)


def abstract_like(tree: PyTree, placed: PyTree) -> PyTree:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)
