"""Items by category and rules of drawing items, shared by all selections with memory.

An item's random numbers depend on its record and not on its index, so the choice does not depend on the order of the
data. Rotation takes items with the fewest visits first, in random order, so an epoch covers all items. The prompts of
the current step are not counted yet, so consecutive steps may share items.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import uniforms_at

Records = Sequence[Mapping[str, Any]]


class Pool(NamedTuple):
    """Items by category.

    Attributes:
      of_item: index of each item's category.
      kinds: values of the columns for each category, sorted.
      ids: `record_ids` of the records.
    """

    of_item: np.ndarray
    kinds: list[tuple[Any, ...]]
    ids: np.ndarray

    @property
    def labels(self) -> list[str]:
        """Names of the categories in metrics."""
        return ["-".join(map(str, kind)) for kind in self.kinds]


def column(records: Records, name: str, asks: str) -> list[Any]:
    """Values of one column over all records.

    Raises:
      ValueError: if a record lacks it; the message begins with `asks`.
    """
    if lacking := next((record for record in records if name not in record), None):
        raise ValueError(f"{asks}, but a record has no {name!r}; its columns are {', '.join(sorted(lacking))}")
    return [record[name] for record in records]


def record_ids(records: Records) -> np.ndarray:
    """A hash of the content of each record."""
    return np.array([zlib.crc32(repr(sorted(record.items())).encode()) for record in records], np.uint32)


def pool(records: Records, columns: str | tuple[str, ...], *, name: str) -> Pool:
    """Items grouped by the values of one or several columns.

    Args:
      records: records of the data, one per item.
      columns: columns whose values are the categories.
      name: hyper-parameter to name in errors.

    Raises:
      ValueError: for a column that a record lacks, or a single category.
    """
    columns = (columns,) if isinstance(columns, str) else tuple(columns)
    asks = f"{name} is {', '.join(columns)}"
    found = list(zip(*(column(records, one, asks) for one in columns), strict=True))
    kinds = sorted(set(found))
    if len(kinds) < 2:
        raise ValueError(
            f"{asks}, but all {len(found)} records are of one kind, {kinds}; it needs two, so mix several levels, or "
            "name another column"
        )
    numbers = {kind: number for number, kind in enumerate(kinds)}
    return Pool(np.array([numbers[kind] for kind in found], np.int32), kinds, record_ids(records))


def items_by_turns(
    of_slot: Int[Array, "N"],
    of_item: Array | np.ndarray,
    visits: Int[Array, "I"],
    key: Array,
    ids: np.ndarray,
    kinds: int,
) -> Int[Array, "N"]:
    """An item of each slot's category, in rotation: fewest visits first, in random order.

    Args:
      of_slot: category of each slot; it must have items.
      of_item: category of each item.
      visits: steps in which each item was trained on.
      key: random key.
      ids: `record_ids`.
      kinds: number of categories.

    Returns:
      Item numbers.
    """
    of_item = jnp.asarray(of_item)
    size = jax.ops.segment_sum(jnp.ones_like(of_item), of_item, num_segments=kinds)
    start = jnp.cumsum(size) - size
    # Number of earlier slots of the same category.
    number = jnp.tril(of_slot[:, None] == of_slot[None, :], -1).sum(axis=1)
    order = jnp.lexsort((uniforms_at(key, jnp.asarray(ids)), visits, of_item))
    return order[start[of_slot] + number % size[of_slot]].astype(jnp.int32)


def wanted_items(wanted: Bool[Array, "I"], visits: Int[Array, "I"], key: Array, count: int, ids: np.ndarray) -> Array:
    """`count` of the wanted items, in rotation; of all items if none is wanted."""
    kept = wanted | ~jnp.any(wanted)
    return items_by_turns(jnp.ones(count, jnp.int32), kept.astype(jnp.int32), visits, key, ids, 2)


def items_by_weight(weights: Float[Array, "I"], key: Array, count: int, ids: np.ndarray) -> Int[Array, "N"]:
    """`count` items drawn with replacement in proportion to their weights; uniformly if all weights are 0."""
    chex.assert_rank(weights, 1)
    weights = jnp.where(jnp.any(weights > 0), weights, 1.0)
    order = np.argsort(ids, kind="stable")
    total = jnp.cumsum(weights[order])
    drawn = jax.random.uniform(key, (count,)) * total[-1]
    last = jnp.max(jnp.where(weights[order] > 0, jnp.arange(len(ids)), 0))
    return jnp.asarray(order)[jnp.minimum(jnp.searchsorted(total, drawn, side="right"), last)].astype(jnp.int32)


def visited(visits: Int[Array, "I"], item: Int[Array, "B"], weight: Float[Array, "B"]) -> Int[Array, "I"]:
    """Visits after a step: one more for each item with a present row."""
    return visits + jnp.zeros_like(visits).at[item].max((weight > 0).astype(jnp.int32))


def means_of(
    values: Float[Array, "B"], number: Int[Array, "B"], there: Array, count: int
) -> tuple[Float[Array, "K"], Bool[Array, "K"]]:
    """(mean over the rows of each number, whether it has rows)."""
    chex.assert_equal_shape([values, number, there])
    there = there > 0
    total = jax.ops.segment_sum(jnp.where(there, values.astype(jnp.float32), 0.0), number, num_segments=count)
    rows = jax.ops.segment_sum(there.astype(jnp.float32), number, num_segments=count)
    return total / jnp.maximum(rows, 1.0), rows > 0
