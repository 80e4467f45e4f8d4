"""A paged key-value cache: each row has a table of its pages, and the samples of a prompt share the prompt's pages.

The tokens of a row are consecutive in its pages, so a row reads no slots of longer rows. On TPU a decode step uses
JAX's ragged paged attention kernel; on other backends the pages are gathered.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.attention import KeyValues, attend
from jaxrl_llm.models.cache import Cache, KeysAndValues, expand_cache, of_layer
from jaxrl_llm.models.layer_runs import cache_of_layer
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.parallel.rules import ambient_layout

# Tokens in a page: the tile that a TPU reads at once from bf16 keys of width 128.
PAGE = 16
# Block sizes of the kernel: pages per read, and queries per block.
KV_PAGES_PER_BLOCK, QUERIES_PER_BLOCK = 16, 8
# The kernel needs heads whose width is a multiple of the lane width.
KERNEL_HEAD_SIZE = 128

PagedKind = Literal["kernel", "gathered"]


class PagedCache(NamedTuple):
    """Pages of all blocks, and the page table of each row.

    Attributes:
      pages: [L * C, PAGE, 2 K, H]: C pages for each of L blocks; in a page, keys and values alternate by head.
      table: [B, M] indices below C, in the order of a row's tokens.
      length: [B] tokens of each row.
    """

    pages: Array
    table: Int[Array, "B M"]
    length: Int[Array, "B"]

    def pages_per_layer(self, layers: int) -> int:
        """C, the pages of one block."""
        return self.pages.shape[0] // layers


class PagedBlock(NamedTuple):
    """The view of a `PagedCache` for one block.

    Attributes:
      pages: of all blocks.
      table: as in `PagedCache`.
      first_page: index of this block's first page.
    """

    pages: Array
    table: Int[Array, "B M"]
    first_page: Array | int


def in_pages(config: TransformerConfig) -> bool:
    """Whether rows that are decoded in a batch keep their keys and values in pages."""
    if config.cache_layout != "auto":
        return config.cache_layout == "paged"
    if config.plain_attention or config.of_several_kinds:
        return False
    serves = paged_kind(queries=1, head_size=config.head_size, dtype=config.compute_dtype) == "kernel"
    return serves and config.cache_dtype == "compute"


def expanded(cache: Cache | PagedCache, samples: int, extra_slots: int, *, config: TransformerConfig) -> Any:
    """`samples` rows for each row of a cache, with slots for more tokens, in the layout of the config.

    Raises:
      ValueError: for several samples of a row that is already in pages.
    """
    if isinstance(cache, PagedCache):
        if samples != 1:
            raise ValueError(
                f"{samples} samples of a row whose cache is in pages; set model.cache_layout to 'contiguous' to branch "
                "from decoded tokens"
            )
        return longer(cache, extra_slots, config.layers) if extra_slots else cache
    if extra_slots and not cache.context and in_pages(config):
        if isinstance(cache.layers, dict):
            each = tuple(of_layer(cache.layers[name], jnp.int32(number)) for name, number in cache_of_layer(config))
            cache = cache._replace(layers=each)
        return paged(cache, samples, extra_slots)
    return expand_cache(cache, samples, extra_slots)


def paged_kind(*, queries: int, head_size: int, dtype: str, backend: str | None = None) -> PagedKind:
    """How attention over pages is computed: by the kernel for one token per row on one TPU, else by gathering pages."""
    serves = queries == 1 and head_size % KERNEL_HEAD_SIZE == 0 and dtype in ("bfloat16", "float32")
    # The compiler cannot partition the kernel over devices.
    ambient = ambient_layout()
    alone = jax.device_count() == 1 if ambient is None else ambient.mesh.size == 1
    return "kernel" if (backend or backend_in_use()) == "tpu" and serves and alone else "gathered"


def paged(cache: Cache, samples: int, extra_slots: int) -> PagedCache:
    """A prefilled cache as pages that `samples` rows of each prompt share, with slots for more tokens in each row.

    Full pages of a prompt are stored once. Each row has its own copy of the last page, to which it appends.

    Args:
      cache: of N left-padded prompts; unrolled or stacked, in the compute dtype, without context.
      samples: rows of each prompt.
      extra_slots: tokens that may be added to a row.
    """
    stacked = cache.layers
    if not isinstance(stacked, KeysAndValues):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    keys, values = jnp.asarray(stacked.keys), jnp.asarray(stacked.values)
    layers, count, kv_heads, size, width = keys.shape
    length = jnp.sum(cache.positions >= 0, axis=1)
    shared, own = -(-width // PAGE), -(-(extra_slots + PAGE) // PAGE)

    # Token t of a prompt is in slot width - length + t.
    order = jnp.minimum(width - length[:, None] + jnp.arange(shared * PAGE), width - 1)
    tokens = jnp.stack([keys.swapaxes(-1, -2), values], axis=3)  # [L, N, K, 2, S, H]
    tokens = jnp.take_along_axis(tokens, order[None, :, None, None, :, None], axis=4)
    tokens = tokens.transpose(0, 1, 4, 2, 3, 5).reshape(layers, count, shared, PAGE, 2 * kv_heads, size)

    # The first page that a row owns is a copy of the last page of its prompt.
    partial = jnp.minimum(length // PAGE, shared - 1)
    last = jnp.take_along_axis(tokens, partial[None, :, None, None, None, None], axis=2)
    first_own = jnp.repeat(last, samples, axis=1)
    rows = count * samples
    empty = jnp.zeros((layers, rows, own - 1, PAGE, 2 * kv_heads, size), tokens.dtype)
    owned = jnp.concatenate([first_own, empty], axis=2)
    pages = jnp.concatenate([x.reshape(layers, -1, *x.shape[3:]) for x in (tokens, owned)], axis=1)

    prompt = jnp.repeat(jnp.arange(count), samples)[:, None]
    full = jnp.repeat(length // PAGE, samples)[:, None]
    place = jnp.arange(shared + own)
    own_page = count * shared + jnp.arange(rows)[:, None] * own + jnp.minimum(place - full, own - 1)
    table = jnp.where(place < full, prompt * shared + jnp.minimum(place, shared - 1), own_page)
    return PagedCache(
        pages.reshape(-1, *pages.shape[2:]), table.astype(jnp.int32), jnp.repeat(length, samples).astype(jnp.int32)
    )


def longer(cache: PagedCache, extra_slots: int, layers: int) -> PagedCache:
    """The cache with more pages at the end of each row."""
    rows, per_layer = cache.table.shape[0], cache.pages_per_layer(layers)
    more = -(-extra_slots // PAGE)
    pages = cache.pages.reshape(layers, per_layer, *cache.pages.shape[1:])
    empty = jnp.zeros((layers, rows * more, *pages.shape[2:]), pages.dtype)
    pages = jnp.concatenate([pages, empty], axis=1).reshape(-1, *cache.pages.shape[1:])
    # New pages follow the last one in use, so that the tokens of a row stay consecutive.
    used = -(-jnp.maximum(cache.length, 1) // PAGE)[:, None]
    place = jnp.arange(cache.table.shape[1] + more)
    old = jnp.take_along_axis(cache.table, jnp.minimum(place, cache.table.shape[1] - 1)[None], axis=1)
    new = per_layer + jnp.arange(rows)[:, None] * more + jnp.clip(place - used, 0, more - 1)
    spare = jnp.take_along_axis(
        cache.table, jnp.clip(place - more, 0, cache.table.shape[1] - 1)[None].repeat(rows, 0), axis=1
    )
    table = jnp.where(place < used, old, jnp.where(place < used + more, new, spare))
    return PagedCache(pages, table.astype(jnp.int32), cache.length)


def written(block: PagedBlock, positions: Int[Array, "B T"], new: KeysAndValues) -> Array:
    """Pages with the keys and values of new tokens at their positions; padding is not written.

    Args:
      block: the pages so far.
      positions: of the tokens in their rows, -1 for padding.
      new: keys [B, K, H, T], values [B, K, T, H].
    """
    batch, length = positions.shape
    keys, values = jnp.asarray(new.keys), jnp.asarray(new.values)
    kv_heads, size = values.shape[1], values.shape[3]
    both = jnp.stack([keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)], axis=3)
    both = both.reshape(batch, length, 2 * kv_heads, size)
    at = jnp.maximum(positions, 0)
    page = jnp.take_along_axis(block.table, at // PAGE, axis=1) + block.first_page
    page = jnp.where(positions >= 0, page, block.pages.shape[0])
    return block.pages.at[page, at % PAGE].set(both.astype(block.pages.dtype), mode="drop")


def paged_attention(
    queries: Float[Array, "B T K G H"],
    block: PagedBlock,
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    windowed: bool | Array,
    cap: float | None,
) -> Float[Array, "B T K G H"]:
    """`attend` over pages, which already have the new tokens."""
    kind = paged_kind(queries=queries.shape[1], head_size=queries.shape[-1], dtype=queries.dtype.name)
    if kind == "kernel" and (window is None or isinstance(windowed, bool)):
        within = window if windowed else None
        return kernel_attention(queries, block, positions, scale=scale, window=within, cap=cap)
    stored, seen = gathered(block)
    keys = KeyValues(stored.keys, stored.values, seen)
    return attend(queries, keys, positions, scale=scale, window=window, windowed=windowed, cap=cap)


def gathered(block: PagedBlock) -> tuple[KeysAndValues, Int[Array, "B S"]]:
    """(keys and values of each row in order, the position of each); positions may be beyond a row's last token."""
    kv_heads, size = block.pages.shape[2] // 2, block.pages.shape[3]
    read = block.pages[block.table + block.first_page]  # [B, M, PAGE, 2K, H]
    read = read.reshape(read.shape[0], -1, kv_heads, 2, size)
    positions = jnp.broadcast_to(jnp.arange(read.shape[1], dtype=jnp.int32), read.shape[:2])
    keys, values = read[..., 0, :].transpose(0, 2, 3, 1), read[..., 1, :].transpose(0, 2, 1, 3)
    return KeysAndValues(keys, values), positions


def kernel_attention(
    queries: Float[Array, "B 1 K G H"],
    block: PagedBlock,
    positions: Int[Array, "B 1"],
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Float[Array, "B 1 K G H"]:
    """Attention of one token per row by the ragged paged attention kernel. Padding attends to the first token.

    Args:
      queries: rotated queries.
      block: the pages, including the keys and values of the new token.
      positions: of the queries.
      scale, window, cap: as for `attend`.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    batch, _, kv_heads, group, size = queries.shape
    options: dict[str, Any] = {"sm_scale": scale, "sliding_window": window, "soft_cap": cap}
    out = ragged_paged_attention(
        queries.reshape(batch, kv_heads * group, size),
        block.pages,
        jnp.maximum(positions[:, 0] + 1, 1).astype(jnp.int32),
        (block.table + block.first_page).astype(jnp.int32),
        jnp.arange(batch + 1, dtype=jnp.int32),
        jnp.array([batch], jnp.int32),
        num_kv_pages_per_block=min(KV_PAGES_PER_BLOCK, block.table.shape[1]),
        num_queries_per_block=QUERIES_PER_BLOCK,
        vmem_limit_bytes=32 * 2**20,
        **options,
    )
    return out.reshape(queries.shape)
