"""Descriptions of parameters: shape, dtype, logical axes and initialiser of every leaf.

Initialisation, sharding, parameter counts, checkpoints and ahead-of-time planning all use the same description.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


@dataclass(frozen=True)
class ParameterSpec:
    """Description of one parameter.

    Attributes:
      shape: its dimensions.
      axes: a logical axis name for each dimension; None for a dimension that is never sharded.
      scale: standard deviation of the normal initialiser; 0 gives the constant `fill`; NaN if only the model's `init`
        can initialise it.
      dtype: storage dtype.
      fill: constant initial value: one for norm gains, zero for biases.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float
    dtype: Any = jnp.float32
    fill: float = 1.0


def _is_spec(leaf) -> bool:
    return isinstance(leaf, ParameterSpec)


def initialise(specs: PyTree, key: Array) -> PyTree:
    """Initial parameters; the key of each leaf is derived from its path, so adding a leaf does not change the others.

    Raises:
      ValueError: for a parameter without an initialiser.
    """

    def draw(path, spec: ParameterSpec):
        if math.isnan(spec.scale):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has no initialiser in its description; use the model's init function"
            )
        if spec.scale == 0:
            return jnp.full(spec.shape, spec.fill, spec.dtype)
        characters = jnp.frombuffer(jax.tree_util.keystr(path).encode(), jnp.uint8).astype(jnp.uint32)
        # A scan keeps this program small: unrolled over the characters of all paths, it would be mostly these steps.
        leaf_key, _ = jax.lax.scan(lambda folded, one: (jax.random.fold_in(folded, one), None), key, characters)
        return (spec.scale * jax.random.truncated_normal(leaf_key, -3.0, 3.0, spec.shape)).astype(spec.dtype)

    return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=_is_spec)


def specs_of(init: Callable[[Array], PyTree], axes: PyTree | None = None) -> PyTree:
    """The description of parameters that a function initialises: shapes and dtypes without an initialiser.

    Their scale is NaN, which `initialise` refuses.

    Args:
      init: key -> params; evaluated abstractly.
      axes: a tuple of logical axis names for each leaf of params; None for parameters that are never sharded.

    Raises:
      ValueError: if the axes do not fit the parameters.
    """
    params = jax.eval_shape(init, jax.random.key(0))

    def spec(path, leaf, names: tuple[str | None, ...]) -> ParameterSpec:
        if len(names) != leaf.ndim:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has the shape {leaf.shape}, but the axes {names}; give a name for each "
                "axis, or None for one that is never sharded"
            )
        return ParameterSpec(leaf.shape, tuple(names), math.nan, leaf.dtype)

    if axes is None:
        axes = jax.tree.map(lambda leaf: (None,) * leaf.ndim, params)
    return jax.tree_util.tree_map_with_path(spec, params, axes)


def abstract(specs: PyTree) -> PyTree:
    """The same tree as `jax.ShapeDtypeStruct`s, without memory for values."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=_is_spec)


def logical_axes(specs: PyTree) -> PyTree:
    """The same tree with each leaf's tuple of logical axis names."""
    return jax.tree.map(lambda s: s.axes, specs, is_leaf=_is_spec)


def parameter_count(specs: PyTree) -> int:
    """Total number of scalars."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))
