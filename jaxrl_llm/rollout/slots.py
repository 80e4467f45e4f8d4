"""Decoding of many rows in a few slots: when the row of a slot ends, the slot takes the next waiting row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.controls import Watch
from jaxrl_llm.rollout.partial_completions import Written


@struct.dataclass
class DecodingLoop:
    """The state of a decoding loop: first the arrays of its slots, then the arrays of all R rows.

    Attributes:
      row: which row each slot writes.
      token: the last of that row.
      running: whether the slot has an unfinished row.
      stopped: rows that ended by themselves.
      written, cache, watch, calls: as in `Decoding`; cache and watch with one row a slot.
    """

    row: Int[Array, "D"]
    token: Int[Array, "D"]
    running: Bool[Array, "D"]
    stopped: Bool[Array, "R"]
    written: Written
    cache: PyTree
    watch: Watch
    calls: Int[Array, ""]


def in_slots(
    model: Model, whole: DecodingLoop, advanced: Callable[[DecodingLoop], DecodingLoop], slots: int
) -> DecodingLoop:
    """Decode all rows in a few slots, in order; a free slot takes the next row at once."""
    take_rows, replace_row = model.take_rows, model.replace_row
    if take_rows is None or replace_row is None:
        raise ValueError(f"slots is {slots}, but the model offers no `take_rows` and `replace_row`; leave slots out")
    rows = whole.row.shape[0]
    # Rows that end with their first token need no slot.
    queue = jnp.argsort(~whole.running, stable=True).astype(jnp.int32)
    waiting = jnp.sum(whole.running)
    own = lambda row, tree: jax.tree.map(lambda x: x[row], tree)  # noqa: E731
    row = queue[jnp.minimum(jnp.arange(slots), rows - 1)]
    steps = whole.written.tokens.shape[1]
    keep = model.keep_window
    kept = (lambda cache: cache) if keep is None else (lambda cache: keep(cache, steps))
    loop = replace(
        whole,
        row=row,
        token=whole.token[row],
        running=jnp.arange(slots) < waiting,
        cache=kept(take_rows(whole.cache, row, steps)),
        watch=own(row, whole.watch),
    )

    def refilled(loop: DecodingLoop, taken: Array) -> tuple[DecodingLoop, Array]:
        free = jnp.argsort(loop.running, stable=True)
        count = jnp.minimum(jnp.sum(~loop.running), waiting - taken)

        def one(index, loop):
            slot, row = free[index], queue[taken + index]
            put = lambda into, value: into.at[slot].set(value)  # noqa: E731
            return replace(
                loop,
                row=put(loop.row, row),
                token=put(loop.token, whole.token[row]),
                running=put(loop.running, True),
                cache=replace_row(loop.cache, slot, whole.cache, row),
                watch=jax.tree.map(put, loop.watch, own(row, whole.watch)),
            )

        return jax.lax.fori_loop(0, count, one, loop), taken + count

    return jax.lax.while_loop(
        lambda carry: jnp.any(carry[0].running),
        lambda carry: refilled(advanced(carry[0]), carry[1]),
        (loop, jnp.minimum(waiting, slots)),
    )[0]


def where_rows(rows: Bool[Array, "D"], chosen: Any, other: Any) -> Any:
    """Rows of one tree where the condition holds, of another elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), chosen, other)
