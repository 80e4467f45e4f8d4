"""Packing: several rows (prompt and completion) in one bin, so that few slots are empty.

Rows are put into bins by best fit, the longest first. All of it is traced, so that it holds for rows that were just
sampled: how many bins are needed is a number of the program, and how many there are is static.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.positions import completion_positions, prompt_positions


class Plan(NamedTuple):
    """The place of each row.

    Attributes:
      bin: its bin.
      offset: of its first token there.
      used: number of bins that are not empty.
    """

    bin: Int[Array, "B"]
    offset: Int[Array, "B"]
    used: Int[Array, ""]


class Bins(NamedTuple):
    """Rows of width W = P + T in N bins of C slots.

    Attributes:
      token: of each slot, the place of its token in the rows one behind the other, row * W + column; B * W where it is
        empty.
      slot: of each token, its place in the bins one behind the other; N * C for padding.
      positions: of each slot, of its token in its own row; -1 where it is empty.
      segments: of each slot, its row; B where it is empty.
    """

    token: Int[Array, "N C"]
    slot: Int[Array, "B W"]
    positions: Int[Array, "N C"]
    segments: Int[Array, "N C"]

    def put(self, x: Array, fill: Any = 0) -> Array:
        """Values per token of the rows, [B, W, ...], as values per slot, [N, C, ...]."""
        return jnp.take(x.reshape(-1, *x.shape[2:]), self.token, axis=0, mode="fill", fill_value=fill)

    def taken(self, x: Array) -> Array:
        """Values per slot, [N, C, ...], as values per token of the rows, [B, W, ...]; 0 for padding."""
        return jnp.take(x.reshape(-1, *x.shape[2:]), self.slot, axis=0, mode="fill", fill_value=0)


def best_fit(length: Int[Array, "B"], capacity: int) -> Plan:
    """Rows in bins: the longest first, each into the bin with the least room that holds it.

    Of equal rows the first comes first, of equal bins the oldest is taken, and a bin is opened where none holds a row.

    Args:
      length: tokens of each row, at most `capacity`.
      capacity: slots of a bin.

    Reference: best-fit decreasing; as packed supervised fine-tuning has it (2107.02027).
    Certainty: verified

    >>> plan = best_fit(jnp.array([5, 3, 7, 2, 4, 1]), 8)
    >>> plan.bin.tolist(), plan.offset.tolist(), int(plan.used)
    ([1, 1, 0, 2, 2, 0], [0, 5, 0, 4, 0, 7], 3)
    """
    chex.assert_rank(length, 1)
    rows, length = length.shape[0], length.astype(jnp.int32)
    order = jnp.argsort(-length, stable=True)

    def one(carry, row):
        room, opened = carry
        holds = (jnp.arange(rows) < opened) & (room >= length[row])
        fullest = jnp.argmin(jnp.where(holds, room, capacity + 1))
        chosen = jnp.where(holds.any(), fullest, opened)
        offset = capacity - room[chosen]
        chosen = chosen.astype(jnp.int32)
        return (room.at[chosen].add(-length[row]), jnp.maximum(opened, chosen + 1)), (chosen, offset)

    start = jnp.full(rows, capacity, jnp.int32), jnp.zeros((), jnp.int32)
    (_, used), (bins, offsets) = jax.lax.scan(one, start, order)
    nowhere = jnp.zeros(rows, jnp.int32)
    return Plan(nowhere.at[order].set(bins), nowhere.at[order].set(offsets), used)


def bins_of(
    plan: Plan, prompt_length: Int[Array, "B"], length: Int[Array, "B"], prompt_width: int, width: int, count: int
) -> Bins:
    """Rows laid out in `count` bins, which must be as many as the plan uses.

    >>> rows = jnp.array([1, 1]), jnp.array([1, 2])
    >>> bins_of(best_fit(rows[0] + rows[1], 6), *rows, 2, 4, 1).positions.tolist()
    [[0, 1, 2, 0, 1, -1]]
    """
    rows, whole = prompt_length.shape[0], prompt_width + width
    positions = jnp.concatenate(
        [prompt_positions(prompt_length, prompt_width), completion_positions(prompt_length, length, width)], axis=1
    )
    slot = jnp.where(positions >= 0, (plan.bin * whole + plan.offset)[:, None] + positions, count * whole)
    nothing = jnp.full(count * whole, rows * whole, jnp.int32)
    token = nothing.at[slot.reshape(-1)].set(jnp.arange(rows * whole, dtype=jnp.int32), mode="drop")
    token = token.reshape(count, whole)
    placed = jnp.take(positions.reshape(-1), token, mode="fill", fill_value=-1)
    return Bins(token, slot, placed, token // whole)


def packed_hidden(
    model: Model,
    params: Any,
    bins: Bins,
    tokens: Int[Array, "N C"],
    *,
    router_choices: Int[Array, "B W L k"] | None = None,
    names: tuple[str, ...] = (),
) -> tuple[Array, dict[str, Array]]:
    """Hidden state of each slot [N, C, D], and by name what the model shows of each token of the rows [B, W, ...].

    Raises:
      ValueError: for a model that cannot tell the rows of a bin apart, or shows nothing of what happens inside.
    """
    if not model.packs:
        raise ValueError("the model takes no segments (Model.packs), so it cannot tell packed rows apart; unpack them")
    given: dict[str, Any] = {"segments": bins.segments}
    if router_choices is not None:
        given["router_choices"] = jnp.moveaxis(bins.put(router_choices), 2, 0)
    arguments = params, tokens, bins.positions, None
    if not names:
        return model.apply(*arguments, **given)[0], {}
    if model.observe is None:
        raise ValueError(f"the model shows nothing of what happens inside, so there is no {', '.join(names)}")
    hidden, _, observed = model.observe(*arguments, names=names, **given)
    return hidden, {name: bins.taken(jnp.moveaxis(observed[name], 0, 2)) for name in names}
