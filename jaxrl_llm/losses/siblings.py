"""Statistics of the samples of a prompt inside a loss, where group ids may be any integers.

A loss sees a part of the batch: whole groups, but under the ids that they have in the whole batch.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def compact_ids(group: Int[Array, "B"]) -> Int[Array, "B"]:
    """The same groups under the ids 0, 1, 2, ..., which segment reductions over B need.

    >>> compact_ids(jnp.array([70, 9, 70, 12])).tolist()
    [2, 0, 2, 1]
    """
    chex.assert_rank(group, 1)
    order = jnp.argsort(group)
    ordered = group[order]
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros_like(group).at[order].set(jnp.cumsum(new, dtype=group.dtype) - 1)


def sibling_sum(values: Float[Array, "B"], ids: Int[Array, "B"]) -> Float[Array, "B"]:
    """Sum over the row's group, on every row; `ids` are compact."""
    return jax.ops.segment_sum(values, ids, num_segments=len(ids))[ids]


def sibling_max(values: Float[Array, "B"], ids: Int[Array, "B"]) -> Float[Array, "B"]:
    """Largest value of the row's group, on every row; `ids` are compact."""
    return jax.ops.segment_max(values, ids, num_segments=len(ids))[ids]


def mean_weight(weights: Float[Array, "B"], ids: Int[Array, "B"]) -> Float[Array, "B"]:
    """Mean weight of the rows of the group that are present, 0 where none is: the weight of the group as a whole."""
    present = sibling_sum((weights > 0).astype(jnp.float32), ids)
    return sibling_sum(weights, ids) / jnp.maximum(present, 1.0)
