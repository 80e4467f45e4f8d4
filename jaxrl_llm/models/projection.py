"""Matrix products with the weights of a block, for all forms in which weights are stored."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.models.adapters import LowRank
from jaxrl_llm.models.int4 import QuantisedInGroups, dequantised_groups
from jaxrl_llm.models.int8 import Quantised
from jaxrl_llm.parallel.rules import shards


class Turned(NamedTuple):
    """A transposed matrix (output axes first), for products with few rows on a CPU.

    The order of the operands determines which one a matrix product on a CPU repacks in each call; here it is the inputs
    and not the weights. With weights [1024, 6144] a product takes 0.7 of the time for 64 rows and a third for 16 rows;
    matrices of fewer than `TURNED_FROM` entries gain too little to be transposed.

    Attributes:
      values: [*O, *I].
    """

    values: Array


Weights = Array | Quantised | QuantisedInGroups | LowRank | Turned
TURNED_FROM = 2**20


def turned(weights: Array, *, inputs: int = 1) -> Turned:
    """Weights [*I, *O] with `inputs` input axes as `Turned`."""
    return Turned(jnp.moveaxis(weights, range(inputs), range(-inputs, 0)))


def project(x: Float[Array, "*B *I"], weights: Weights, *, inputs: int = 1) -> Float[Array, "*B *O"]:
    """Contract the last `inputs` axes of x with the first ones of `weights`, in the dtype of x.

    It is computed as one product of two matrices: on a CPU only these use the fast kernels, and the backward pass of
    the equivalent einsum takes several times as long. If a mesh shards positions or the MLP, it is computed as the
    einsum.

    Args:
      x: any leading axes, then the input axes.
      weights: [*I, *O], or transposed (`Turned`); in int4, dequantised for the product; in int8, with the product
        scaled afterwards; or with an adapter: x @ base + (scale * (x @ down)) @ up, so that the merged weights are
        never in memory.
      inputs: number of input axes.
    """
    if isinstance(weights, LowRank):
        narrow = weights.scale * project(x, weights.down, inputs=inputs)
        return project(x, weights.base, inputs=inputs) + project(narrow, weights.up)
    if isinstance(weights, Quantised):
        product = project(x, weights.values, inputs=inputs).astype(jnp.float32)
        return (product * weights.scale.reshape(weights.scale.shape[inputs:])).astype(x.dtype)
    weights = dequantised_groups(weights) if isinstance(weights, QuantisedInGroups) else weights
    rows = math.prod(x.shape[-inputs:])
    if isinstance(weights, Turned):
        values = weights.values.astype(x.dtype)
        # Without the barrier the compiler would transpose the product back.
        product = jax.lax.optimization_barrier(values.reshape(-1, rows) @ x.reshape(-1, rows).T).T
        return product.reshape(*x.shape[:-inputs], *values.shape[:-inputs])
    if shards("positions", "mlp") > 1:
        # Merging a sharded axis with the axes before it would require a gather.
        axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
        return jax.lax.dot_general(x, weights.astype(x.dtype), (axes, ((), ())))
    product = x.reshape(-1, rows) @ weights.astype(x.dtype).reshape(rows, -1)
    return product.reshape(*x.shape[:-inputs], *weights.shape[inputs:])
