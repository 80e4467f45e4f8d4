"""The key-value cache: prefill fills it, a group of samples shares it without a copy, and decoding extends it."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.models.layer_kinds import DeltaConfig
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.parallel.rules import ANY, constrain

# The largest int8 magnitude of a symmetric range.
LARGEST = 127


class Rounded(NamedTuple):
    """Keys or values in int8: values * scale, with one scale for the vector of each token and head.

    Attributes:
      values: int8.
      scale: float32 of the same shape with H = 1.
    """

    values: Array
    scale: Array


class KeysAndValues(NamedTuple):
    """Keys and values of some slots.

    Attributes:
      keys: [B, K, H, S], or that `Rounded`. Slots are the last axis, as in scores: a CPU multiplies this layout 2.5
          times as fast.
      values: [B, K, S, H], or that `Rounded`.
    """

    keys: Array | Rounded
    values: Array | Rounded


class Windowed(NamedTuple):
    """Keys and values of each row's last W tokens, of a layer with a window of W; slots are reused cyclically.

    Attributes:
      keys, values: as in `KeysAndValues`, with W slots.
    """

    keys: Array | Rounded
    values: Array | Rounded


class Recurrent(NamedTuple):
    """The state of a gated delta-net layer for each row. While the cache has no slots it may have fewer rows, as a
    `Segment` may.

    Attributes:
      inputs: of the convolution for the last tokens, [B, T, K, C].
      state: [B, K, G, H, W], float32.
    """

    inputs: Array
    state: Array


class Recent(NamedTuple):
    """Positions of the tokens in `Windowed` layers.

    Attributes:
      positions: of the token in each slot, -1 if it is empty.
      used: tokens written so far; slot `used % W` is the next.
    """

    positions: Int[Array, "B W"]
    used: Int[Array, ""]


class Segment(NamedTuple):
    """Read-only keys and values, head-major.

    Attributes:
      layers: a tuple with one `KeysAndValues` per block when unrolled, one with a leading layer axis when scanned, or
        one for each of `TransformerConfig.caches` if there are several. None for layers that add no keys and values.
      positions: position of the token in each slot, -1 where the slot is empty or padding.
    """

    layers: PyTree
    positions: Int[Array, "N S"]


class Cache(NamedTuple):
    """Keys and values of all tokens so far.

    Attributes:
      layers: as in a `Segment` with one row per sequence: the part that is written, including `Recurrent` and
          `Windowed`.
      positions: as of a `Segment`.
      used: tokens written so far, the same number for all rows: those of a shorter row are padding. Slot `used % S` is
        the next, so that S slots serve longer runs of tokens as long as no row needs more than its last S.
      context: segments written before. A segment may have fewer rows: row b of the cache continues row b // (B / N) of
        it, so all samples of a prompt read one copy of its keys and values.
      recent: of `Windowed` layers; None if there are none.
    """

    layers: PyTree
    positions: Int[Array, "B S"]
    used: Int[Array, ""]
    context: tuple[Segment, ...] = ()
    recent: Recent | None = None


def init_cache(rows: int, slots: int, *, config: TransformerConfig) -> Cache:
    """An empty cache for `slots` tokens per row."""

    def stored(*shape: int, vector: int) -> Array | Rounded:
        if config.cache_dtype == "compute":
            return jnp.zeros(shape, config.compute_dtype)
        scales = list(shape)
        scales[vector] = 1
        return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros(scales, jnp.float32))

    def empty(kind: str, *stacked: int) -> KeysAndValues | Recurrent:
        if kind == "delta_blocks" and config.delta is not None:
            return empty_state(rows, config.delta, config.compute_dtype, *stacked)
        heads, key_size, value_size = config.of_stack(kind).cached_sizes
        first = *stacked, rows, heads
        return KeysAndValues(stored(*first, key_size, slots, vector=-2), stored(*first, slots, value_size, vector=-1))

    caches = config.caches
    if config.unrolled:
        kinds = {layer: kind for kind, numbers in caches.items() for layer in numbers}
        layers = tuple(empty(kinds[layer]) if layer in kinds else None for layer in range(config.layers))
    else:
        layers = {kind: empty(kind, len(numbers)) for kind, numbers in caches.items()}
        layers = layers["blocks"] if len(layers) == 1 else layers
    return Cache(layers, jnp.full((rows, slots), -1, jnp.int32), jnp.int32(0))


def empty_state(rows: int, delta: DeltaConfig, dtype: Any, *stacked: int) -> Recurrent:
    """The initial recurrent state of rows; `stacked` axes come first."""
    heads = (delta.key_heads, delta.values_per_key)
    return Recurrent(
        jnp.zeros((*stacked, rows, delta.kernel - 1, delta.key_heads, delta.mixed_width), dtype),
        jnp.zeros((*stacked, rows, *heads, delta.key_width, delta.value_width), jnp.float32),
    )


def _is_entry(node: Any) -> bool:
    return isinstance(node, KeysAndValues | Windowed | Recurrent)


def _written(cache: Cache) -> Segment:
    """The keys and values of a cache."""
    keep = lambda entry: entry if isinstance(entry, KeysAndValues) else None  # noqa: E731
    return Segment(jax.tree.map(keep, cache.layers, is_leaf=_is_entry), cache.positions)


def expand_cache(cache: Cache, samples: int, extra_slots: int) -> Cache:
    """A cache of `samples` rows for each row, with room for `extra_slots` more tokens.

    The written tokens become context that those rows share: nothing is copied, and a group needs one prefill.
    """
    count = cache.positions.shape[0]
    written = () if cache.positions.shape[1] == 0 else (_written(cache),)
    # Without slots there is no recurrent part, and rows of one prompt share its state.
    rows = np.arange(count * samples) // samples if extra_slots else None
    return _empty(cache, count * samples, extra_slots, rows)._replace(context=(*cache.context, *written))


def taken_rows(cache: Cache, rows: Int[Array, "D"], extra_slots: int) -> Cache:
    """A cache that continues any choice of rows, each with its own copy of their context."""
    count = cache.positions.shape[0]
    frozen = expand_cache(cache, 1, 0)
    context = tuple(
        jax.tree.map(lambda leaf, part=part: _rows(leaf, part, rows * part.positions.shape[0] // count), part)
        for part in frozen.context
    )
    return _empty(cache, rows.shape[0], extra_slots, rows)._replace(context=context)


def replaced_row(cache: Cache, slot: Array | int, source: Cache, row: Array | int) -> Cache:
    """A cache from `taken_rows(source, ...)` in which one row restarts from another row of the source."""
    count = source.positions.shape[0]

    def put(leaf, new, axis, number):
        one = jax.lax.dynamic_slice_in_dim(new, number, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(leaf, one, slot, axis)

    context = []
    for part, given in zip(cache.context, expand_cache(source, 1, 0).context, strict=True):
        number = row * given.positions.shape[0] // count
        copied = lambda leaf, new, part=part, number=number: put(leaf, new, _row_axis(leaf, part), number)  # noqa: E731
        context.append(jax.tree.map(copied, part, given))

    def started(entry, given):
        if not isinstance(entry, Recurrent):
            return entry  # nothing of it is at the positions below
        number = row * _remembering(given) // count
        return Recurrent(
            put(entry.inputs, given.inputs, entry.inputs.ndim - 4, number),
            put(entry.state, given.state, entry.state.ndim - 5, number),
        )

    layers = jax.tree.map(started, cache.layers, source.layers, is_leaf=_is_entry)

    def nowhere(positions):
        nothing = jnp.full((1, positions.shape[1]), -1, jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(positions, nothing, slot, 0)

    recent = None if cache.recent is None else cache.recent._replace(positions=nowhere(cache.recent.positions))
    return cache._replace(layers=layers, positions=nowhere(cache.positions), context=tuple(context), recent=recent)


def keep_window(cache: Cache, tokens: int, *, config: TransformerConfig) -> Cache:
    """A cache whose windowed layers keep only the last `window` of the tokens written from now on.

    It is for a cache right after `expand_cache` or `taken_rows` to which each row's tokens are added one at a time,
    without padding between them. Its context stays complete. The cache is returned unchanged if nothing would be saved.

    Args:
      cache: with slots for a first part of the tokens, or for all.
      tokens: largest number of tokens added to a row.
      config: of the model.
    """
    window = config.window
    if window is None or tokens <= window or not isinstance(cache, Cache) or not any(config.windowed):
        return cache

    def short(entry: KeysAndValues) -> Windowed:
        def cut(leaf: Array, axis: int) -> Array:
            shape = list(leaf.shape)
            shape[axis] = window
            return jnp.zeros(shape, leaf.dtype)

        return Windowed(
            jax.tree.map(lambda leaf: cut(leaf, -1), entry.keys), jax.tree.map(lambda leaf: cut(leaf, -2), entry.values)
        )

    def of_name(name: str, entry: Any) -> Any:
        return short(entry) if config.windowed[config.caches[name][0]] and isinstance(entry, KeysAndValues) else entry

    names = {layer: name for name, layers in config.caches.items() for layer in layers}
    if config.unrolled:
        layers = tuple(entry and of_name(names[layer], entry) for layer, entry in enumerate(cache.layers))
    elif isinstance(cache.layers, dict):
        layers = {name: of_name(name, entry) for name, entry in cache.layers.items()}
    else:
        layers = of_name("blocks", cache.layers)
    nowhere = jnp.full((cache.positions.shape[0], window), -1, jnp.int32)
    return cache._replace(layers=layers, recent=Recent(nowhere, jnp.int32(0)))


def cut_cache(cache: Cache, length: Int[Array, "B"]) -> Cache:
    """A cache whose rows see only their first `length` tokens, even if their shared context is longer.

    Rows that share keys and values keep sharing one copy; each row has its own mask. It is for a cache
    right after `expand_cache`, and not for layers that are recurrent: their state is that behind the last token.
    """

    def cut(part: Segment) -> Segment:
        seen = jnp.repeat(part.positions, length.shape[0] // part.positions.shape[0], axis=0)
        return part._replace(positions=jnp.where(seen < length[:, None], seen, -1))

    return cache._replace(context=tuple(cut(part) for part in cache.context))


def _remembering(entry: Recurrent) -> int:
    """Number of rows with their own state."""
    return entry.state.shape[-5]


def _taken(leaf: Array, rows: Int[Array, "D"] | np.ndarray, axis: int) -> Array:
    """Entries of one axis, sharded like rows.

    Where the rows are known before the program runs, and each entry is taken equally often and in order, nothing is
    gathered: a gather over devices would hold all entries on each.
    """
    count = leaf.shape[axis]
    often = len(rows) // count if isinstance(rows, np.ndarray) else 0
    if often and np.array_equal(rows, np.repeat(np.arange(count), often)):
        if often == 1:
            return leaf
        return constrain(jnp.repeat(leaf, often, axis=axis), *[ANY] * axis, "rows")
    return jnp.take(leaf, rows, axis=axis)


def _empty(cache: Cache, count: int, slots: int, rows: Int[Array, "D"] | np.ndarray | None) -> Cache:
    """Without context, for so many rows and slots, which go on from the states of the given rows of the cache.

    Without rows nothing is recurrent, and a windowed layer goes on from row b // (count / B) of the cache.
    """
    before = cache.positions.shape[0]
    of_windows = np.arange(count) * before // count if rows is None else rows

    def fresh(entry: KeysAndValues | Windowed | Recurrent) -> KeysAndValues | Windowed | Recurrent:
        if isinstance(entry, Recurrent):
            if rows is None:
                return entry
            number = rows * _remembering(entry) // before
            return Recurrent(*(_taken(leaf, number, leaf.ndim + of) for leaf, of in zip(entry, (-4, -5), strict=True)))
        if isinstance(entry, Windowed):
            return jax.tree.map(lambda leaf: _taken(leaf, of_windows, leaf.ndim - 4), entry)

        def like(leaf, *shape):
            return jnp.zeros((*leaf.shape[:-4], count, leaf.shape[-3], *shape), leaf.dtype)

        return KeysAndValues(
            jax.tree.map(lambda leaf: like(leaf, leaf.shape[-2], slots), entry.keys),
            jax.tree.map(lambda leaf: like(leaf, slots, leaf.shape[-1]), entry.values),
        )

    recent = cache.recent and cache.recent._replace(positions=_taken(cache.recent.positions, of_windows, 0))
    layers = jax.tree.map(fresh, cache.layers, is_leaf=_is_entry)
    return Cache(layers, jnp.full((count, slots), -1, jnp.int32), jnp.int32(0), recent=recent)


def _row_axis(leaf: Array, part: Segment) -> int:
    return 0 if leaf.shape == part.positions.shape else leaf.ndim - 4


def _rows(leaf: Array, part: Segment, rows: Int[Array, "D"]) -> Array:
    return jnp.take(leaf, rows, axis=_row_axis(leaf, part))


def of_layer(stored: PyTree, layer: Array | None) -> PyTree:
    """The leaves of one block: entry `layer` of stacked leaves, or the leaves unchanged if `layer` is None."""
    return stored if layer is None else jax.tree.map(lambda leaf: leaf[layer], stored)


def stored_at(stored: PyTree, layer: Array | None, new: PyTree) -> PyTree:
    """The inverse of `of_layer`: stacked leaves with a new entry `layer`, or what is new."""
    if layer is None:
        return new
    return jax.tree.map(lambda leaf, x: jax.lax.dynamic_update_index_in_dim(leaf, x, layer, 0), stored, new)


Entry = TypeVar("Entry", KeysAndValues, Windowed)


def remembered(stored: Entry, layer: Array | None, new: KeysAndValues, used: Int[Array, ""], slots: int) -> Entry:
    """New keys and values written into the cache of one block, from slot `used % slots` on.

    Args:
      stored: keys and values so far; where `layer` is given, those of all blocks, of which it is this block's.
      layer: as for `of_layer`.
      new: of T tokens.
      used: tokens written before.
      slots: S.
    """
    at = used % slots

    def write(old: Array | Rounded, update: Any, slot_axis: int) -> Array | Rounded:
        if isinstance(old, Rounded):
            update = rounded(update, axis=-3 - slot_axis)
        start = [0] * jax.tree.leaves(old)[0].ndim
        start[slot_axis] = at
        if layer is not None:
            start[0] = layer
            update = jax.tree.map(lambda x: x[None], update)
        put = lambda into, part: jax.lax.dynamic_update_slice(into, part.astype(into.dtype), start)  # noqa: E731
        return jax.tree.map(put, old, update)

    return type(stored)(write(stored.keys, new.keys, -1), write(stored.values, new.values, -2))


def rounded(x: Float[Array, "..."], *, axis: int) -> Rounded:
    """The nearest of 255 values for each entry, with scale = max |x| / 127 along an axis: at most scale / 2 away."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True, initial=0.0)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return Rounded(jnp.clip(jnp.round(wide / scale), -LARGEST, LARGEST).astype(jnp.int8), scale)
