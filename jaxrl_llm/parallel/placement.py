"""Shardings of parameters and of arrays shaped like them: optimiser moments, references, critics."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxrl_llm.parallel.rules import RULES, Rules, ambient_layout, axes_of, constrain, partition_spec

# Names whose size a mesh axis must divide. The others (vocabulary, embed) are not split otherwise.
STRICT = ("kv_heads", "mlp", "expert")
HOST = "pinned_host"


def _is_spec(leaf: Any) -> bool:
    return hasattr(leaf, "axes") and hasattr(leaf, "shape")


def shardings(specs: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """A sharding for each parameter.

    Args:
      specs: a tree of `ParameterSpec`, the shape of the parameters.
      mesh: the devices.
      rules: from logical axes to mesh axes.

    Raises:
      ValueError: if mesh axes do not divide the number of heads, of experts, or the width of an MLP.
    """

    def sharding(path: Any, spec: Any) -> NamedSharding:
        _check(path, spec, mesh, rules)
        return NamedSharding(mesh, partition_spec(spec.axes, spec.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, specs, is_leaf=_is_spec)


def _check(path: Any, spec: Any, mesh: Mesh, rules: Rules) -> None:
    for name, size in zip(spec.axes, spec.shape, strict=True):
        if name not in STRICT:
            continue
        axes = [axis for axis in rules.get(name, ()) if mesh.shape.get(axis, 1) > 1]
        count = math.prod(mesh.shape[axis] for axis in axes)
        if size % count == 0:
            continue
        fitting = ", ".join(str(n) for n in range(1, min(size, mesh.size) + 1) if size % n == 0 and mesh.size % n == 0)
        raise ValueError(
            f"{' x '.join(f'mesh.{axis} {mesh.shape[axis]}' for axis in axes)} does not divide the {size} {name} of "
            f"{jax.tree_util.keystr(path)}; choose {fitting} and give the rest of the {mesh.size} devices to "
            f"mesh.fsdp, or keep this axis whole with mesh.rules: {{{name}: []}}"
        )


def kept_whole(specs: PyTree, mesh: Mesh, rules: Rules = RULES) -> dict[str, int]:
    """Logical axes of parameters, with their sizes, that the mesh would split and does not divide."""
    found = {}
    for spec in jax.tree.leaves(specs, is_leaf=_is_spec):
        given = axes_of(spec.axes, spec.shape, mesh, rules)
        for name, size, axes in zip(spec.axes, spec.shape, given, strict=True):
            asked = [axis for axis in rules.get(name, ()) if mesh.shape.get(axis, 1) > 1]
            if len(axes) < len(asked) and size % math.prod(mesh.shape[axis] for axis in asked):
                found[name] = size
    return found


def constrained_like(specs: PyTree, tree: PyTree, dtype: Any = None) -> PyTree:
    """Constrain parameters, or arrays shaped like them, to the sharding of parameters inside a program.

    Args:
      specs: of the parameters; None: no constraint.
      tree: arrays.
      dtype: dtype to which matrices are cast first, to move less data; None: unchanged.
    """
    if specs is None or ambient_layout() is None:
        return tree

    def pinned(spec: Any, leaf: Any) -> Any:
        if dtype is not None and "embed" in spec.axes and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        return constrain(leaf, *spec.axes)

    return jax.tree.map(pinned, specs, tree, is_leaf=_is_spec)


def state_shardings(
    state: PyTree, params: PyTree, placed: PyTree, mesh: Mesh, *, on_host: Collection[str] = ()
) -> PyTree:
    """A sharding for every array of a training state: arrays that belong to a parameter have its sharding.

    An array belongs to the parameter whose path is the end of its own path and whose shape it has: moments of the
    optimiser, the copy for a divergence, the backbone of a critic. A statistic of fewer axes (rows and columns of
    Adafactor) has the sharding of its remaining axes. All other arrays are small and replicated.

    Args:
      state: any tree of arrays or of their shapes.
      params: the parameters, or their shapes.
      placed: their shardings.
      mesh: the devices.
      on_host: names of fields of the state in host memory.
    """
    known: dict[tuple[str, ...], list[tuple[tuple[int, ...], P]]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed), strict=True):
        known.setdefault(_names(path), []).append((tuple(leaf.shape), sharding.spec))

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        kind = {"memory_kind": HOST} if names and names[0] in on_host else {}
        for start in range(len(names)):
            for shape, spec in known.get(names[start:], ()):
                found = _restricted(tuple(leaf.shape), shape, spec)
                if found is not None:
                    return NamedSharding(mesh, found, **kind)
        return NamedSharding(mesh, P(), **kind)

    return jax.tree_util.tree_map_with_path(sharding, state)


def _restricted(shape: tuple[int, ...], whole: tuple[int, ...], spec: P) -> P | None:
    """The sharding of an array of this shape that belongs to a parameter: of all of its axes, or the remaining ones."""
    parts = [*spec, *[None] * (len(whole) - len(spec))]
    if shape == whole:
        return P(*parts)
    if len(shape) != len(whole) - 1:
        return None
    options = {
        tuple(parts[:gone] + parts[gone + 1 :])
        for gone in range(len(whole))
        if whole[:gone] + whole[gone + 1 :] == shape
    }
    return P(*options.pop()) if len(options) == 1 else None


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)
