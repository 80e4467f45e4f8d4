"""Matrices stored as int8: a quarter of float32's memory, for weights that do not learn."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

from jaxrl_llm.models.parameters import ParameterSpec

# Symmetric: -128 is not used, so that a matrix and its negative have the same magnitudes.
LARGEST = 127


@struct.dataclass
class Quantised:
    """A matrix as values * scale, with one scale for each output, so that a product is scaled once, at its end.

    Attributes:
      values: of the shape of the matrix, in [-127, 127].
      scale: the same shape with 1 for every input axis.
      dtype: name of the dtype that the matrix had.
    """

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]
    dtype: str = struct.field(pytree_node=False, default="float32")


def input_axes(inputs: int, stacked: int = 1) -> tuple[int, ...]:
    """The axes of a stacked matrix [L, *I, *O] that are summed over in a product: as many as it has inputs."""
    return tuple(range(stacked, stacked + inputs))


def quantised(weights: Float[Array, "L ..."], *, inputs: int, stacked: int = 1) -> Quantised:
    """Round to the nearest of 255 values: scale = max |w| / 127 over the inputs of each output.

    The error of a weight is at most scale / 2; on normal weights it is 0.7 % of their size.

    Args:
      weights: stacked over layers, [L, *I, *O].
      inputs: number of axes I.
      stacked: number of axes L: layers, and experts of a layer.
    """
    wide = weights.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=input_axes(inputs, stacked), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    values = jnp.clip(jnp.round(wide / scale), -LARGEST, LARGEST).astype(jnp.int8)
    return Quantised(values, scale, weights.dtype.name)


def dequantised(weights: Quantised) -> Float[Array, "..."]:
    """values * scale, in the dtype that the matrix had."""
    return (weights.values.astype(jnp.float32) * weights.scale).astype(weights.dtype)


def quantised_spec(spec: ParameterSpec, *, inputs: int, stacked: int = 1) -> Any:
    """The spec of a parameter after `quantised`."""
    summed = input_axes(inputs, stacked)
    one = lambda sizes, instead: tuple(instead if i in summed else size for i, size in enumerate(sizes))  # noqa: E731
    return Quantised(
        values=ParameterSpec(spec.shape, spec.axes, 0.0, jnp.int8, fill=0.0),  # type: ignore[arg-type]
        scale=ParameterSpec(one(spec.shape, 1), one(spec.axes, None), 0.0, jnp.float32),  # type: ignore[arg-type]
        dtype=jnp.dtype(spec.dtype).name,
    )
