"""Groups within groups: the samples of a prompt that share something, such as an answer or a length budget."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Int


def subgroup_ids(group: Int[Array, "B"], key: Int[Array, "B"]) -> Int[Array, "B"]:
    """Ids in [0, B) of the parts of each group whose rows have the same key.

    >>> subgroup_ids(jnp.array([4, 0, 4, 4]), jnp.array([7, 7, 9, 7])).tolist()
    [1, 0, 2, 1]
    """
    chex.assert_rank([group, key], 1)
    chex.assert_equal_shape([group, key])
    order = jnp.lexsort((key, group))
    pairs = jnp.stack([group[order], key[order]])
    new = jnp.any(pairs[:, 1:] != pairs[:, :-1], axis=0)
    ids = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])
    return jnp.zeros(len(group), jnp.int32).at[order].set(ids)
