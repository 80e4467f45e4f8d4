"""The key-value cache: one prefill fills it, it is repeated for a group of samples, and decoding extends it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxrl_llm.models.transformer_config import TransformerConfig


class Cache(NamedTuple):
    """Keys and values seen so far, head-major.

    Attributes:
      layers: (keys, values), each [B, K, S, H]: a tuple with one pair a block when unrolled, one pair with a leading
        layer axis when scanned.
      positions: position of the token in each slot, -1 where the slot is empty or padding.
      used: slots written so far, the same for all rows (prompts are left-padded).
    """

    layers: PyTree
    positions: Int[Array, "B S"]
    used: Int[Array, ""]


def init_cache(rows: int, slots: int, *, config: TransformerConfig) -> Cache:
    """An empty cache for `slots` tokens a row."""
    shape = (rows, config.kv_heads, slots, config.head_size)
    if not config.unrolled:
        shape = (config.layers, *shape)
    pair = lambda: (jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))  # noqa: E731
    layers = tuple(pair() for _ in range(config.layers)) if config.unrolled else pair()
    return Cache(layers, jnp.full((rows, slots), -1, jnp.int32), jnp.int32(0))


def expand_cache(cache: Cache, samples: int, extra_slots: int) -> Cache:
    """Repeat each row `samples` times and add `extra_slots` empty slots: one prefill serves a whole group."""

    def expand(leaf):
        leaf = jnp.repeat(leaf, samples, axis=leaf.ndim - 4)
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, extra_slots), (0, 0)])

    positions = jnp.repeat(cache.positions, samples, axis=0)
    positions = jnp.pad(positions, [(0, 0), (0, extra_slots)], constant_values=-1)
    return Cache(jax.tree.map(expand, cache.layers), positions, cache.used)


def remembered(cached, keys, values, used):
    """Write new keys and values into the cache of one block.

    Args:
      cached: (keys, values, layer): [B, K, S, H] where `layer` is None, else [L, B, K, S, H], of which entry `layer` is
        this block's.
      keys: [B, K, T, H].
      values: [B, K, T, H].
      used: first slot to write.

    Returns:
      the filled leaves, and all keys and values of this block, [B, K, S, H].
    """
    *stored, layer = cached
    at = (0, 0, used, 0) if layer is None else (layer, 0, 0, used, 0)
    new = (keys, values) if layer is None else (keys[None], values[None])
    filled = tuple(
        jax.lax.dynamic_update_slice(leaf, update.astype(leaf.dtype), at)
        for leaf, update in zip(stored, new, strict=True)
    )
    keys, values = filled if layer is None else (leaf[layer] for leaf in filled)
    return filled, keys, values
