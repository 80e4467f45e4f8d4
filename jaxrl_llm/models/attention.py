"""One attention function with three paths: plain, jax.nn's (XLA or cuDNN on GPU), and splash attention on TPU.

The plain path is the definition and supports every shape. The others support whole sequences (training, scoring and the
prefill of a rollout), where queries and keys are the same tokens; a decode step has few queries and is always plain.
They take "may attend to" from the order of slots and so expect a row's positions to be consecutive, with padding (-1)
before or after; the plain path looks at the positions themselves. Several sequences may be packed into one row, one
behind the other: they are told apart by `segments`, on every path, and a token attends to its own segment alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.parallel.rules import ambient_layout, axes_of, shards

AttentionChoice = Literal["auto", "plain", "xla", "cudnn", "splash"]
AttentionKind = Literal["plain", "xla", "cudnn", "splash"]

# The lane width of the MXU; block sizes of splash attention are multiples of it.
LANES = 128
# The largest head size that cuDNN's flash attention supports on every GPU that has it.
CUDNN_HEAD_SIZE = 128


def attention_in_use(
    choice: AttentionChoice,
    *,
    queries: int,
    keys: int,
    head_size: int,
    dtype: str,
    cap: float | None,
    backend: str | None = None,
) -> AttentionKind:
    """The path that `attend` takes.

    Args:
      choice: setting of the config; "auto" takes splash attention on TPU and cuDNN on GPU where they support the case,
        else the plain path.
      queries: query tokens per row.
      keys: key slots per row.
      head_size: H.
      dtype: compute dtype.
      cap: soft cap of the scores, or None.
      backend: None takes that of this process.
    """
    if queries != keys:
        return "plain"
    if choice != "auto":
        return choice
    backend = backend or backend_in_use()
    if backend == "tpu" and queries >= LANES and _can_split():
        return "splash"
    if backend == "gpu" and dtype == "bfloat16" and cap is None and head_size <= CUDNN_HEAD_SIZE and head_size % 8 == 0:
        return "cudnn"
    return "plain"


class KeyValues(NamedTuple):
    """Keys and values that queries may attend to. There may be fewer rows than rows of queries: B / N rows of queries
    share one.

    Attributes:
      keys: rotated, [N, K, H, S]; (values, scale) of int8 if the cache stores int8.
      values: [N, K, S, H]; in the same format.
      seen: position of each, -1 for padding and empty slots.
    """

    keys: Any
    values: Any
    seen: Int[Array, "N S"]


def attend(
    queries: Float[Array, "B T K G H"],
    new: KeyValues,
    positions: Int[Array, "B T"],
    context: Sequence[KeyValues] = (),
    *,
    scale: float,
    window: int | None = None,
    windowed: bool | Bool[Array, ""] = True,
    cap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    kind: AttentionKind = "plain",
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal softmax attention with G query heads to each key/value head; scores and softmax in float32.

    A token attends to the tokens of its row at positions (own - window, own]. A query without visible keys (padding)
    returns a finite value that is not used.

    Args:
      queries: rotated queries.
      new: keys and values of as many rows: those of this call, and what is remembered beside them.
      positions: of the queries, -1 for padding.
      context: what else is remembered; several rows of queries may share a row of it.
      scale: factor on the scores.
      window: tokens that are seen, the own one included; None sees all.
      windowed: whether this layer keeps to the window; an array where layers are scanned over.
      cap: scores s become cap * tanh(s / cap).
      sinks: a score for each query head that takes part in the softmax and has no value; on the plain path alone.
      kind: the path, from `attention_in_use`.
      segments: number of the sequence that each token of a packed row belongs to; None where a row is one sequence.
        Keys are those of the queries then, without a context.

    Returns:
      the mean value under softmax(scores), one for each query head.
    """
    chex.assert_rank([queries, positions, new.seen], [5, 2, 2])
    if kind == "plain":
        parts = []
        for part in (*context, new):
            seen = jnp.repeat(part.seen, positions.shape[0] // part.seen.shape[0], axis=0)
            parts.append((part, _of_segment(visible(positions, seen, window, windowed), segments)))
        return plain_attention(queries, parts, scale=scale, cap=cap, sinks=sinks)
    if kind == "splash":
        path = partial(splash_attention, scale=scale, cap=cap, segments=segments)
    else:
        path = partial(library_attention, scale=scale, kind=kind, segments=segments)
    arrays = (queries, new.keys.swapaxes(-1, -2), new.values, new.seen)
    if window is None or isinstance(windowed, bool):
        return path(*arrays, window=window if windowed else None)
    # A window is part of the kernel, so that layers that are scanned over choose between two kernels.
    return jax.lax.cond(windowed, partial(path, window=window), partial(path, window=None), *arrays)


def visible(
    positions: Int[Array, "B T"], seen: Int[Array, "B S"], window: int | None, windowed: bool | Bool[Array, ""]
) -> Bool[Array, "B T S"]:
    """Whether each query may attend to each key."""
    allowed = (seen[:, None, :] <= positions[:, :, None]) & (seen[:, None, :] >= 0)
    if window is None or windowed is False:
        return allowed
    near = seen[:, None, :] > positions[:, :, None] - window
    return allowed & (near if windowed is True else near | ~windowed)


def _of_segment(allowed: Bool[Array, "B T S"], segments: Int[Array, "B T"] | None) -> Bool[Array, "B T S"]:
    """Mask that restricts attention to the sequence of each token."""
    return allowed if segments is None else allowed & (segments[:, :, None] == segments[:, None, :])


def plain_attention(
    queries: Float[Array, "B T K G H"],
    parts: Sequence[tuple[KeyValues, Bool[Array, "B T S"]]],
    *,
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B T K G H"]:
    """softmax(mask(cap(scale * q k^T))) v with every score in memory, over the keys of all parts together.

    Args:
      queries: rotated queries.
      parts: keys and values, and whether each query may attend to each of them.
      scale, cap, sinks: as for `attend`.
    """
    scores = []
    for part, allowed in parts:
        found = _scores(queries, part.keys) * scale
        if cap is not None:
            found = cap * jnp.tanh(found / cap)
        scores.append(jnp.where(allowed[:, None, None], found, -1e30))
    if sinks is not None:
        wide = sinks.astype(jnp.float32)[None, :, :, None, None]
        scores.append(jnp.broadcast_to(wide, (*scores[0].shape[:-1], 1)))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = weights if sinks is None else weights[..., :-1]
    borders = np.cumsum([allowed.shape[-1] for _, allowed in parts])[:-1]
    shares = jnp.split(weights, borders, axis=-1)
    return sum(
        (_mixed(share, part.values, queries.dtype) for share, (part, _) in zip(shares, parts, strict=True)),
        start=jnp.zeros((), queries.dtype),
    )


def _folded(x: Array, rows: int) -> Array:
    """Join the rows that share a row of keys: [B, T, K, G, H] -> [N, K, B / N * T * G, H]."""
    batch, length, kv_heads, group, size = x.shape
    folded = x.reshape(rows, batch // rows * length, kv_heads, group, size).swapaxes(1, 2)
    return folded.reshape(rows, kv_heads, -1, size)


def _split_group(kv_heads: int) -> bool:
    """Whether devices share the query heads of one key, as in latent attention: their axis is then not joined with
    others, since a joined axis could not be split."""
    return kv_heads == 1 and shards("kv_heads") > 1


def _scores(queries: Float[Array, "B T K G H"], keys: Any) -> Float[Array, "B K G T S"]:
    batch, length, kv_heads, group, _ = queries.shape
    stored, factor = keys if isinstance(keys, tuple) else (keys, None)
    rows = stored.shape[0]
    if rows == batch and _split_group(kv_heads):
        scores = jnp.einsum(
            "btkgh,bkhs->bktgs", queries, stored.astype(queries.dtype), preferred_element_type=jnp.float32
        )
        return (scores if factor is None else scores * factor[:, :, None]).swapaxes(2, 3)
    scores = jnp.einsum(
        "nkqh,nkhs->nkqs", _folded(queries, rows), stored.astype(queries.dtype), preferred_element_type=jnp.float32
    )
    if factor is not None:
        scores = scores * factor
    scores = scores.reshape(rows, kv_heads, batch // rows, length, group, -1)
    return scores.transpose(0, 2, 1, 4, 3, 5).reshape(batch, kv_heads, group, length, -1)


def _mixed(weights: Float[Array, "B K G T S"], values: Any, dtype: Any) -> Float[Array, "B T K G H"]:
    batch, kv_heads, group, length, width = weights.shape
    stored, factor = values if isinstance(values, tuple) else (values, None)
    rows = stored.shape[0]
    if rows == batch and _split_group(kv_heads):
        weights = weights.swapaxes(2, 3)
        weights = weights if factor is None else weights * factor.swapaxes(-1, -2)[:, :, None]
        mixed = jnp.einsum("bktgs,bksh->bktgh", weights.astype(dtype), stored.astype(dtype))
        return mixed.swapaxes(1, 2)
    weights = weights.reshape(rows, batch // rows, kv_heads, group, length, width).transpose(0, 2, 1, 4, 3, 5)
    weights = weights.reshape(rows, kv_heads, -1, width)
    if factor is not None:
        weights = weights * factor.swapaxes(-1, -2)
    mixed = jnp.einsum("nkqs,nksh->nkqh", weights.astype(dtype), stored.astype(dtype))
    mixed = mixed.reshape(rows, kv_heads, batch // rows * length, group, -1).swapaxes(1, 2)
    return mixed.reshape(batch, length, kv_heads, group, -1)


def library_attention(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    seen: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    kind: Literal["xla", "cudnn"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T K G H"]:
    """Attention through `jax.nn.dot_product_attention`.

    It describes padding by lengths alone, so each row is rotated until its first real token is at the front. Packed
    rows use a mask of all pairs instead.
    """
    rows, length, kv_heads, group, size = queries.shape
    if segments is not None:
        attended = jax.nn.dot_product_attention(
            queries.reshape(rows, length, kv_heads * group, size),
            keys.swapaxes(1, 2),
            values.swapaxes(1, 2),
            mask=_of_segment(visible(seen, seen, window, True), segments)[:, None],
            scale=scale,
            implementation=kind,
        )
        return attended.reshape(queries.shape)
    real = seen >= 0
    first = jnp.argmax(real, axis=1)[:, None]
    # A row of padding alone counts as one token: kernels divide by the sum of a row's weights.
    lengths = jnp.maximum(real.sum(axis=1), 1).astype(jnp.int32)
    slots = jnp.arange(length)

    def turned(x, by):
        return jnp.take_along_axis(x, ((slots + by) % length)[:, :, None, None], axis=1)

    attended = jax.nn.dot_product_attention(
        turned(queries.reshape(rows, length, kv_heads * group, size), first),
        turned(keys.swapaxes(1, 2), first),
        turned(values.swapaxes(1, 2), first),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=kind,
    )
    return turned(attended, -first).reshape(queries.shape)


def splash_attention(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    seen: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    cap: float | None,
    segments: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """Attention through the splash attention kernel, padded to whole blocks.

    Padding is a segment of its own, and so is each sequence of a packed row. The kernel cannot be partitioned by the
    compiler: on a mesh it is split by hand, over rows, over heads, and over the positions of queries, each device with
    the keys and values of all positions.

    Args:
      queries, keys, values, seen, scale, window, cap, segments: as for `attend`, T queries and T keys.
      interpret: run the kernel in Pallas' interpreter, for tests without a TPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    rows, length, kv_heads, group, size = queries.shape
    by_rows, by_heads, by_positions = _splash_axes(rows, kv_heads)
    shards = _count(by_positions)
    padded = -(-length // (LANES * shards)) * LANES * shards
    block = max(block for block in (LANES, 2 * LANES, 4 * LANES) if padded // shards % block == 0)
    extra = [(0, 0), (0, 0), (0, padded - length), (0, 0)]
    heads_first = (queries * scale).astype(queries.dtype).reshape(rows, length, kv_heads * group, size).swapaxes(1, 2)
    padded_queries, padded_keys, padded_values = (jnp.pad(x, extra) for x in (heads_first, keys, values))
    of_sequence = 1 if segments is None else segments + 1
    segment = jnp.pad(jnp.where(seen >= 0, of_sequence, 0).astype(jnp.int32), [(0, 0), (0, padded - length)])

    shape = (padded, padded)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * (kv_heads * group)),
        block_sizes=_blocks(block),
        head_shards=_count(by_heads),
        q_seq_shards=shards,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )

    def every_row(kernel, queries, keys, values, of_queries, of_keys):
        def one_row(queries, keys, values, of_queries, of_keys):
            return kernel(queries, keys, values, segment_ids=splash.SegmentIds(of_queries, of_keys))

        return jax.vmap(one_row)(queries, keys, values, of_queries, of_keys)

    computed: Callable[..., Any] = every_row
    if (ambient := ambient_layout()) is not None:
        row, head, position = (axes or None for axes in (by_rows, by_heads, by_positions))
        asked, held = P(row, head, position), P(row, head)
        parts = kernel.manual_sharding_spec(NamedSharding(ambient.mesh, P(head, position)))
        computed = jax.shard_map(
            every_row,
            mesh=ambient.mesh,
            in_specs=(parts, asked, held, held, P(row, position), P(row)),
            out_specs=asked,
            check_vma=False,
        )
    attended = computed(kernel, padded_queries, padded_keys, padded_values, segment, segment)
    return attended[:, :, :length].swapaxes(1, 2).reshape(queries.shape)


def _blocks(size: int):
    """Square blocks for the forward kernel and both backward kernels."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def _splash_axes(rows: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Mesh axes of rows, of heads, and of the positions of queries, which are padded to a multiple of their axes."""
    ambient = ambient_layout()
    if ambient is None:
        return (), (), ()
    by_rows, by_heads, by_positions = axes_of(
        ("rows", "kv_heads", "positions"), (rows, kv_heads, ambient.mesh.size), *ambient
    )
    return by_rows, by_heads, by_positions


def _count(axes: tuple[str, ...]) -> int:
    ambient = ambient_layout()
    return 1 if ambient is None else math.prod(ambient.mesh.shape[axis] for axis in axes)


def _can_split() -> bool:
    """Whether the splash kernel can place its arrays: on one device, or on the current mesh."""
    return jax.device_count() == 1 or ambient_layout() is not None
