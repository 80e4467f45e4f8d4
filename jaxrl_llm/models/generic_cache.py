"""Caches for models of one's own: repeating any cache for a group of samples, and a cache for models that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

# Sizes at which `init_cache` is looked at: far enough apart that no size stands for two things.
_ROWS, _SLOTS = 2, 64


class CacheAxes(NamedTuple):
    """Which axis of one leaf of a cache counts what.

    Attributes:
      rows: axis of the rows; None for what all rows share, such as the number of slots in use.
      slots: axis of the slots; None for what does not grow with them, such as a recurrent state.
      offset: size of that axis beyond the number of slots.
    """

    rows: int | None
    slots: int | None
    offset: int


def cache_axes(init_cache: Callable[[int, int], PyTree]) -> list[CacheAxes]:
    """The axes of every leaf of a cache, found from the shapes of empty caches of different sizes.

    Raises:
      ValueError: where a leaf does not have one entry a row along one axis, or one a slot along one axis.
    """

    def leaves(rows: int, slots: int) -> list:
        return jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init_cache(rows, slots)))

    found = []
    triples = zip(leaves(_ROWS, _SLOTS), leaves(_ROWS + 1, _SLOTS), leaves(_ROWS, _SLOTS + 1), strict=True)
    for (path, leaf), (_, by_rows), (_, by_slots) in triples:
        rows, slots = _growing(leaf.shape, by_rows.shape), _growing(leaf.shape, by_slots.shape)
        if rows is False or slots is False or (rows is not None and leaf.shape[rows] != _ROWS):
            raise ValueError(
                f"init_cache gives {jax.tree_util.keystr(path) or 'an array'} the shape {leaf.shape} for {_ROWS} rows "
                f"of {_SLOTS} slots, {by_rows.shape} with a row more and {by_slots.shape} with a slot more; without an "
                "expand_cache, each array needs one axis of exactly one entry a row, and at most one other that grows "
                "by one with each slot: lay it out so, or give expand_cache"
            )
        found.append(CacheAxes(rows, slots, 0 if slots is None else leaf.shape[slots] - _SLOTS))
    return found


def _growing(shape: tuple[int, ...], grown: tuple[int, ...]) -> int | bool | None:
    """The one axis that is larger by one; None where none is, False where that is not what differs."""
    if len(shape) != len(grown):
        return False
    changes = [grown[axis] - size for axis, size in enumerate(shape)]
    if not any(changes):
        return None
    return changes.index(1) if sorted(changes) == [0] * (len(shape) - 1) + [1] else False


def repeating(init_cache: Callable[[int, int], PyTree]) -> Callable[[PyTree, int, int], PyTree]:
    """An `expand_cache` for any cache whose arrays have an axis of rows and an axis of slots, wherever those are.

    Rows are repeated in place (row i becomes rows i * samples ... of the result), and new slots hold what an empty
    cache holds there. Arrays without an axis of rows are shared and stay as they are.

    Raises:
      ValueError: where the axes cannot be told; see `cache_axes`.
    """
    axes = cache_axes(init_cache)

    def expand_cache(cache: PyTree, samples: int, extra_slots: int) -> PyTree:
        leaves, structure = jax.tree.flatten(cache)
        sized = list(zip(leaves, axes, strict=True))
        rows = max((leaf.shape[at.rows] for leaf, at in sized if at.rows is not None), default=1)
        slots = max((leaf.shape[at.slots] - at.offset for leaf, at in sized if at.slots is not None), default=1)
        empty = jax.tree.leaves(init_cache(rows * samples, slots + extra_slots))

        def expand(leaf: Array, at: CacheAxes, empty: Array) -> Array:
            leaf = leaf if at.rows is None else jnp.repeat(leaf, samples, axis=at.rows)
            return leaf if at.slots is None else jax.lax.dynamic_update_slice(empty, leaf, (0,) * leaf.ndim)

        return structure.unflatten([expand(*each, new) for each, new in zip(sized, empty, strict=True)])

    return expand_cache


class Record(NamedTuple):
    """The tokens so far: the cache of a model without its own cache.

    Attributes:
      tokens: in the order in which they came.
      positions: of each token, -1 where the slot is empty or padding.
      used: number of slots written so far.
    """

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    used: Int[Array, ""]


def recomputing(
    forward: Callable[[PyTree, Array, Array], Float[Array, "B T D"]],
) -> tuple[Callable[..., tuple[Array, Record | None]], Callable[[int, int], Record]]:
    """(apply, init_cache) for a model without a cache: every call computes all slots again.

    The result equals that of the whole sequence, for any model that ignores padding; but a completion of T tokens costs
    T forward passes over prompt and completion, where a cache of keys and values costs about one.

    Args:
      forward: (params, tokens [B, T], positions [B, T]) -> hidden [B, T, D].
    """

    def init_cache(rows: int, slots: int) -> Record:
        empty = jnp.zeros((rows, slots), jnp.int32)
        return Record(empty, empty - 1, jnp.int32(0))

    def apply(params: PyTree, tokens: Array, positions: Array, cache: Record | None):
        if cache is None:
            return forward(params, tokens, positions), None
        write = lambda stored, new: jax.lax.dynamic_update_slice(stored, new.astype(jnp.int32), (0, cache.used))  # noqa: E731
        known = Record(write(cache.tokens, tokens), write(cache.positions, positions), cache.used + tokens.shape[1])
        hidden = forward(params, known.tokens, known.positions)
        return jax.lax.dynamic_slice_in_dim(hidden, cache.used, tokens.shape[1], axis=1), known

    return apply, init_cache
