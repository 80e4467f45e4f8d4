"""One table from the names of an array's axes to the axes of a mesh, and the few functions that read it.

Model code names what an axis holds (`rows`, `kv_heads`, `vocabulary`) and never sees a mesh: inside `layout` the names
are looked up, outside of it nothing happens. This module imports nothing of the project: anything may import it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

# From the slowest links to the fastest: devices that differ in the last axis alone are neighbours.
AXES = ("slice", "data", "fsdp", "expert", "sequence", "tensor")
Rules = Mapping[str, tuple[str, ...]]

# Where an axis of an array goes. Of activations: rows, positions, decoded_rows, sampled_rows; of parameters: embed,
# layer; of both: kv_heads, mlp, vocabulary, expert.
RULES: Rules = MappingProxyType(
    {
        "rows": ("slice", "data", "fsdp", "expert"),
        "positions": ("sequence",),
        # In decoding a row has one position, and the devices along a sequence take rows of their own.
        "decoded_rows": ("slice", "data", "fsdp", "expert", "sequence"),
        # A token is drawn from a whole distribution: rows are split further, instead of gathering the vocabulary.
        "sampled_rows": ("slice", "data", "fsdp", "expert", "sequence", "tensor"),
        # Devices along a sequence, or that share experts, compute with the same weights: each keeps a part of them.
        "embed": ("fsdp", "sequence", "expert"),
        "layer": (),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "vocabulary": ("tensor",),
        "expert": ("expert",),
    }
)
# A dimension whose placement is left to the compiler.
ANY = P.UNCONSTRAINED


class Layout(NamedTuple):
    """A mesh and the table that is read for it."""

    mesh: Any
    rules: Rules


_AMBIENT: ContextVar[Layout | None] = ContextVar("layout", default=None)


def changed_rules(changes: Mapping[str, Sequence[str]], rules: Rules = RULES) -> Rules:
    """The table with some entries replaced.

    Raises:
      ValueError: for a name or a mesh axis that does not exist.
    """
    for name, axes in changes.items():
        if name not in rules:
            raise ValueError(f"mesh.rules names {name!r}, which is no axis of an array; {_nearest(name, rules)}")
        for axis in axes:
            if axis not in AXES:
                raise ValueError(
                    f"mesh.rules.{name} names {axis!r}, which is no axis of the mesh; {_nearest(axis, AXES)}"
                )
    return MappingProxyType({**rules, **{name: tuple(axes) for name, axes in changes.items()}})


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


@contextmanager
def layout(mesh: Mesh | None, rules: Rules = RULES) -> Iterator[None]:
    """Names mean axes of this mesh while a program is traced inside; nothing changes without a mesh.

    Raises:
      ValueError: for a mesh with axes that the table cannot name, or that are not left to the compiler.
    """
    _require_usable(mesh)
    token = _AMBIENT.set(None if mesh is None else Layout(mesh, rules))
    try:
        yield
    finally:
        _AMBIENT.reset(token)


def laid_out(function: Callable, mesh: Mesh | None, rules: Rules = RULES) -> Callable:
    """`function`, traced inside `layout`."""
    _require_usable(mesh)

    @wraps(getattr(function, "func", function))  # programs are named after what they compute
    def inside(*args, **kwargs):
        with layout(mesh, rules):
            return function(*args, **kwargs)

    return inside


def _require_usable(mesh: Mesh | None) -> None:
    if mesh is None:
        return
    for axis in mesh.axis_names:
        if axis not in AXES:
            raise ValueError(
                f"mesh has the axis {axis!r}, along which nothing would be shared; {_nearest(axis, AXES)} "
                "(parallel.make_mesh makes one)"
            )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has the axis types {mesh.axis_types}; all of them must be Auto: use parallel.make_mesh, or give "
            "jax.make_mesh axis_types=(AxisType.Auto,) * (number of axes)"
        )


def decoding(rules: Rules, *, gathered: bool = True) -> Rules:
    """The table while tokens are sampled.

    Args:
      rules: the table of the update.
      gathered: every device along `embed` holds the weights whole, instead of gathering them for each token.
    """
    changes = {"rows": rules["decoded_rows"]} | ({"embed": ()} if gathered else {})
    return MappingProxyType({**rules, **changes})


def axes_of(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules = RULES
) -> list[tuple[str, ...]]:
    """Mesh axes of each dimension: those of its name, in order, for as long as their product divides the size.

    A mesh axis is used once: a dimension leaves out what an earlier one took.
    """
    taken: set[str] = set()
    chosen = []
    for name, size in zip(names, shape, strict=True):
        axes, product = [], 1
        for axis in rules.get(name, ()) if isinstance(name, str) else ():
            count = mesh.shape.get(axis, 1)
            if count == 1 or axis in taken:
                continue
            if size % (product * count):
                break
            axes.append(axis)
            product *= count
        taken.update(axes)
        chosen.append(tuple(axes))
    return chosen


def partition_spec(names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules = RULES) -> P:
    """How an array with these axes lies on the mesh."""
    return P(*(axes or None for axes in axes_of(names, shape, mesh, rules)))


def constrain(x: Array, *names: Any) -> Array:
    """Pin an array inside a program to where its axes belong; the array itself outside of `layout`.

    Args:
      x: any array.
      names: one entry for each of its first axes: a name of the table; None for an axis that every device holds whole;
        ANY to leave it to the compiler, as all further axes are and those that the mesh does not divide.
    """
    ambient = _AMBIENT.get()
    if ambient is None:
        return x
    names = (*names, *[ANY] * (x.ndim - len(names)))
    axes = axes_of(names, x.shape, *ambient)
    wanted = [_wanted(name, ambient) for name in names]
    spec = P(
        *(
            (found or (ANY if asked else None)) if name is not ANY else ANY
            for name, found, asked in zip(names, axes, wanted, strict=True)
        )
    )
    if all(part is ANY for part in spec):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(ambient.mesh, spec))


def _wanted(name: Any, ambient: Layout) -> bool:
    """Whether a name means any axis of this mesh at all."""
    return isinstance(name, str) and any(ambient.mesh.shape.get(axis, 1) > 1 for axis in ambient.rules.get(name, ()))


def constrain_rows(tree: PyTree, *before: None, name: str = "rows") -> PyTree:
    """Arrays with one entry a row, spread over the devices that rows belong to.

    Args:
      tree: any pytree.
      before: None for each axis in front of the rows.
      name: which rows, in the table.
    """
    return jax.tree.map(lambda x: constrain(x, *before, name), tree)


def shards(*names: str) -> int:
    """Into how many parts the mesh cuts an array with these axes, if it divides them; 1 outside of `layout`."""
    ambient = _AMBIENT.get()
    if ambient is None:
        return 1
    axes = {axis for name in names for axis in ambient.rules.get(name, ())}
    return math.prod(ambient.mesh.shape.get(axis, 1) for axis in axes)


def map_shards(function: Callable[[PyTree, PyTree], PyTree], whole: PyTree, split: PyTree, *names: str) -> PyTree:
    """function(whole, split), each device on its own part of `split`, with no communication in between.

    What a program computes for each row alone is written so where the compiler would not see it, such as in a loop over
    chunks: gradients of `whole` are then summed over devices once, behind the loop. Mesh axes that do not belong to
    these names (tensor) remain the compiler's.

    Args:
      function: of parts; its results start with the same axes as `split`.
      whole: what every device reads all of along these mesh axes.
      split: arrays whose first axes have these names, all of one size in them.
      names: in the table.
    """
    ambient = _AMBIENT.get()
    if ambient is None:
        return function(whole, split)
    sizes = jax.tree.leaves(split)[0].shape[: len(names)]
    axes = axes_of(names, sizes, *ambient)
    manual = {axis for part in axes for axis in part}
    if not manual:
        return function(whole, split)
    by = P(*(part or None for part in axes))

    def local(whole, split):
        with layout(None):
            return function(whole, split)

    return jax.shard_map(
        local, mesh=ambient.mesh, in_specs=(P(), by), out_specs=by, axis_names=manual, check_vma=False
    )(whole, split)


def map_parts(
    function: Callable[[Any, PyTree, PyTree], Array], parts: PyTree, split: PyTree, *names: str, part: str
) -> Array:
    """function(first, parts, split), where each device has some of `parts`, summed over all of them.

    For a mixture of experts: the tokens of the devices that share the experts are gathered, each device computes what
    its own experts add, and the sums return to where the tokens came from.

    Args:
      function: of some parts, the number of the first of them, and rows; its result starts with the axes of `split`.
      parts: arrays whose first axis has the name `part`.
      split: arrays whose first axes have `names`, all of one size in them.
      names, part: in the table.
    """
    ambient = _AMBIENT.get()
    if ambient is None:
        return function(0, parts, split)
    axes = axes_of(names, jax.tree.leaves(split)[0].shape[: len(names)], *ambient)
    (over,) = axes_of((part,), jax.tree.leaves(parts)[0].shape[:1], *ambient)
    manual = {axis for some in (*axes, over) for axis in some}
    if not manual:
        return function(0, parts, split)
    by = P(*(some or None for some in axes))
    # Rows come from several devices of one group of experts only where their own axis is split over it.
    exchanged = tuple(axis for axis in over if axis in axes[0])
    repeated = tuple(axis for axis in over if axis not in axes[0])

    def local(parts, split):
        with layout(None):
            first = jax.lax.axis_index(over) * jax.tree.leaves(parts)[0].shape[0] if over else 0
            if exchanged:
                split = jax.tree.map(lambda x: jax.lax.all_gather(x, exchanged, axis=0, tiled=True), split)
            total = function(first, parts, split)
            if repeated:
                total = jax.lax.psum(total, repeated)
            return jax.lax.psum_scatter(total, exchanged, tiled=True) if exchanged else total

    return jax.shard_map(
        local, mesh=ambient.mesh, in_specs=(P(over or None), by), out_specs=by, axis_names=manual, check_vma=False
    )(parts, split)


def ambient_layout() -> Layout | None:
    """The mesh and the table inside `layout`, for kernels that the compiler cannot split."""
    return _AMBIENT.get()
