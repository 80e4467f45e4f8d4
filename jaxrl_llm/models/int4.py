"""Matrices stored in four bits, with a scale for each group of inputs: 4.25 bits a weight in groups of 64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8

from jaxrl_llm.models.parameters import ParameterSpec

# Symmetric: -8 is not used.
LARGEST, OFFSET = 7, 8
# Inputs that share a scale; fewer if their number has no such divisor.
GROUP = 64


@struct.dataclass
class QuantisedInGroups:
    """A matrix as values * scale, one scale for each output and group of neighbours along the last input axis.

    Attributes:
      values: two per byte, the earlier one in the lower bits; half as long along the last input axis.
      scale: one entry a group along that axis, bfloat16.
      axis: index of the last input axis, from the end.
      dtype: name of the dtype that the matrix had.
    """

    values: UInt8[Array, "..."]
    scale: Float[Array, "..."]
    axis: int = struct.field(pytree_node=False, default=-2)
    dtype: str = struct.field(pytree_node=False, default="float32")


def group_size(inputs: int) -> int:
    """Neighbours that share a scale: the largest power of two up to 64 that divides the inputs.

    Raises:
      ValueError: for an odd number of inputs, because two values share a byte.
    """
    if inputs % 2:
        raise ValueError(f"lora.int4 is true, but a matrix has {inputs} inputs, an odd number; use lora.int8")
    return min(GROUP, inputs & -inputs)


def quantised_in_groups(weights: Float[Array, "L ..."], *, inputs: int, stacked: int = 1) -> QuantisedInGroups:
    """Round to the nearest of 15 values: scale = max |w| / 7 over the group.

    The error of a weight is at most scale / 2; on normal weights it is 10 % of their size.

    Args:
      weights: stacked over layers, [L, *I, *O].
      inputs: number of axes I.
      stacked: number of axes L: layers, and experts of a layer.
    """
    axis = stacked + inputs - 1
    shape, size = weights.shape, group_size(weights.shape[axis])
    grouped = weights.astype(jnp.float32).reshape(*shape[:axis], -1, size, *shape[axis + 1 :])
    largest = jnp.max(jnp.abs(grouped), axis=axis + 1)
    scale = (jnp.where(largest > 0, largest, 1.0) / LARGEST).astype(jnp.bfloat16)
    values = jnp.round(grouped / jnp.expand_dims(scale.astype(jnp.float32), axis + 1))
    values = (jnp.clip(values, -LARGEST, LARGEST) + OFFSET).astype(jnp.uint8).reshape(shape)
    pairs = values.reshape(*shape[:axis], -1, 2, *shape[axis + 1 :])
    low, high = jnp.take(pairs, 0, axis=axis + 1), jnp.take(pairs, 1, axis=axis + 1)
    return QuantisedInGroups(low | (high << 4), scale, axis - weights.ndim, weights.dtype.name)


def dequantised_groups(weights: QuantisedInGroups) -> Float[Array, "..."]:
    """values * scale, in the dtype that the matrix had."""
    axis = weights.values.ndim + weights.axis
    pairs = jnp.stack([weights.values & 15, weights.values >> 4], axis=axis + 1)
    first, last = weights.values.shape[:axis], weights.values.shape[axis + 1 :]
    groups = weights.scale.shape[axis]
    values = pairs.reshape(*first, groups, -1, *last).astype(jnp.float32) - OFFSET
    wide = values * jnp.expand_dims(weights.scale.astype(jnp.float32), axis + 1)
    return wide.reshape(*first, -1, *last).astype(weights.dtype)


def quantised_in_groups_spec(spec: ParameterSpec, *, inputs: int, stacked: int = 1) -> Any:
    """The spec of a parameter after `quantised_in_groups`."""
    axis = stacked + inputs - 1

    def shaped(length: int, dtype: Any) -> ParameterSpec:
        shape = (*spec.shape[:axis], length, *spec.shape[axis + 1 :])
        return ParameterSpec(shape, spec.axes, 0.0, dtype, fill=0.0)

    size = spec.shape[axis]
    return QuantisedInGroups(
        values=shaped(size // 2, jnp.uint8),  # type: ignore[arg-type]
        scale=shaped(size // group_size(size), jnp.bfloat16),  # type: ignore[arg-type]
        axis=axis - len(spec.shape),
        dtype=jnp.dtype(spec.dtype).name,
    )
