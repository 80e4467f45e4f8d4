"""The table that maps names of array axes to mesh axes, and the functions that use it.

Model code names the content of an axis (`rows`, `kv_heads`, `vocabulary`) and does not use a mesh: inside `layout` the
names are looked up, outside of it they have no effect. This module imports nothing of the project, so any module may
import it.
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
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

# From the slowest links to the fastest: devices that differ only in the last axis are neighbours.
AXES = ("slice", "data", "fsdp", "expert", "sequence", "tensor")
Rules = Mapping[str, tuple[str, ...]]

# Array axis -> mesh axes. Axes of activations: rows, positions, decoded_rows, sampled_rows; of parameters: embed,
# layer; of both: kv_heads, mlp, vocabulary, expert.
RULES: Rules = MappingProxyType(
    {
        "rows": ("slice", "data", "fsdp", "expert"),
        "positions": ("sequence",),
        # In decoding a row has one position, and the devices along `sequence` take different rows.
        "decoded_rows": ("slice", "data", "fsdp", "expert", "sequence"),
        # Sampling a token needs the whole distribution: rows are split further instead of gathering the vocabulary.
        "sampled_rows": ("slice", "data", "fsdp", "expert", "sequence", "tensor"),
        # Devices along `sequence` and `expert` compute with the same weights: each keeps a part of them.
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
    """A mesh and its sharding rules."""

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
            raise ValueError(f"mesh.rules names {name!r}, which is not an axis of an array; {_nearest(name, rules)}")
        for axis in axes:
            if axis not in AXES:
                raise ValueError(
                    f"mesh.rules.{name} names {axis!r}, which is not an axis of the mesh; {_nearest(axis, AXES)}"
                )
    return MappingProxyType({**rules, **{name: tuple(axes) for name, axes in changes.items()}})


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


@contextmanager
def layout(mesh: Mesh | None, rules: Rules = RULES) -> Iterator[None]:
    """A context in which names of axes refer to this mesh while a program is traced; without a mesh it has no effect.

    Raises:
      ValueError: for a mesh with unknown axes, or with axis types other than Auto.
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
      gathered: every device along `embed` holds the full weights, instead of gathering them for each token.
    """
    changes = {"rows": rules["decoded_rows"]} | ({"embed": ()} if gathered else {})
    return MappingProxyType({**rules, **changes})


def axes_of(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules = RULES
) -> list[tuple[str, ...]]:
    """Mesh axes of each dimension: those of its name, in order, as long as their product divides the size.

    Each mesh axis is used once, by the first dimension that names it.
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
    """The partition spec of an array with these axes."""
    return P(*(axes or None for axes in axes_of(names, shape, mesh, rules)))


def constrain(x: Array, *names: Any) -> Array:
    """Constrain the sharding of an array inside a program by the names of its axes; no effect outside of `layout`.

    Args:
      x: any array.
      names: one entry for each of its first axes: a name of the table; None for an axis that is not split; ANY to leave
        it to the compiler, as for all further axes and those that the mesh does not divide.
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
    """Whether a name maps to any axis of this mesh."""
    return isinstance(name, str) and any(ambient.mesh.shape.get(axis, 1) > 1 for axis in ambient.rules.get(name, ()))


def constrain_rows(tree: PyTree, *before: None, name: str = "rows") -> PyTree:
    """Shard arrays with one entry per row over the devices of rows.

    Args:
      tree: any pytree.
      before: one None for each axis before the rows.
      name: name of the rows in the table.
    """
    return jax.tree.map(lambda x: constrain(x, *before, name), tree)


def shards(*names: str) -> int:
    """Number of parts into which the mesh splits an array with these axes, if it divides them; 1 outside of
    `layout`."""
    ambient = _AMBIENT.get()
    if ambient is None:
        return 1
    axes = {axis for name in names for axis in ambient.rules.get(name, ())}
    return math.prod(ambient.mesh.shape.get(axis, 1) for axis in axes)


def map_shards(function: Callable[[PyTree, PyTree], PyTree], whole: PyTree, split: PyTree, *names: str) -> PyTree:
    """Apply function(whole, split) on each device to its own part of `split`, without communication.

    This is for row-wise computations that the compiler would not recognise, such as a loop over chunks: gradients of
    `whole` are then summed over devices once, after the loop. Other mesh axes (tensor) are left to the compiler.

    Args:
      function: of parts; its results start with the same axes as `split`.
      whole: arrays that are replicated along these mesh axes.
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
    function: Callable[[Any, Sequence[Array], PyTree], Array],
    parts: Sequence[Array],
    split: PyTree,
    *names: str,
    part_names: Sequence[tuple[str | None, ...]],
) -> Array:
    """The sum over devices of function(first, parts, split), where each device has some of `parts`.

    For a mixture of experts: the tokens of the devices along `expert` are gathered, each device computes the outputs of
    its own experts, and the sums are scattered back. Experts whose hidden units are split as well give partial sums,
    which are added up once for each token, rather than once for each of its experts.

    Args:
      function: of some parts, the number of the first of them, and rows; its result starts with the axes of `split`. It
        is a sum over the split axes of the parts.
      parts: arrays. One that lacks an axis over which others are split is zero on all devices along it but the first,
        so that it is added once.
      split: arrays whose first axes have `names`, all of one size in them.
      names: in the table.
      part_names: of the axes of each of `parts`, all with the same first one.
    """
    ambient = _AMBIENT.get()
    if ambient is None:
        return function(0, parts, split)
    axes = axes_of(names, jax.tree.leaves(split)[0].shape[: len(names)], *ambient)
    of_parts = [axes_of(given, part.shape, *ambient) for given, part in zip(part_names, parts, strict=True)]
    over = of_parts[0][0]
    summed = tuple(dict.fromkeys(axis for dimensions in of_parts for some in dimensions for axis in some))
    manual = {axis for some in axes for axis in some} | {*summed}
    if not manual:
        return function(0, parts, split)
    by = P(*(some or None for some in axes))
    # Rows need to be gathered only if their axis is split over the devices of the experts.
    exchanged = tuple(axis for axis in summed if axis in axes[0])
    repeated = tuple(axis for axis in summed if axis not in axes[0])

    def once(part, dimensions):
        missing = [axis for axis in summed if not any(axis in some for some in dimensions)]
        first = [jax.lax.axis_index(axis) == 0 for axis in missing]
        return jnp.where(jnp.stack(first).all(), part, 0) if first else part

    def local(parts, split):
        with layout(None):
            first = jax.lax.axis_index(over) * parts[0].shape[0] if over else 0
            if exchanged:
                split = jax.tree.map(lambda x: jax.lax.all_gather(x, exchanged, axis=0, tiled=True), split)
            total = function(first, [once(*each) for each in zip(parts, of_parts, strict=True)], split)
            if repeated:
                total = jax.lax.psum(total, repeated)
            return jax.lax.psum_scatter(total, exchanged, tiled=True) if exchanged else total

    by_part = [P(*(some or None for some in dimensions)) for dimensions in of_parts]
    return jax.shard_map(
        local, mesh=ambient.mesh, in_specs=(by_part, by), out_specs=by, axis_names=manual, check_vma=False
    )(list(parts), split)


def ambient_layout() -> Layout | None:
    """The mesh and rules of the current `layout`, for kernels that the compiler cannot split."""
    return _AMBIENT.get()
