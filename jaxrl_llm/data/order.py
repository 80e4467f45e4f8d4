"""The order of rows in the steps of a run: a pure function of (seed, step), for one data set or a weighted mixture.

There is no state between steps, and no dependence on the number of hosts: each host reads whole batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jaxrl_llm.bounds import counted

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Batches(Generic[Batch]):
    """An infinite sequence of batches: `batches[step]` does not depend on earlier reads.

    Each epoch has its own order. Rows at the end of an epoch that do not fill a batch are not used in this epoch, so
    that no step has the same prompt twice.

    Attributes:
      dataset: the grain pipeline.
      steps_per_epoch: batches in one pass over the data.
      kept: items in the data.
      dropped: items dropped because they are too long.
      chosen: (numbers of items) -> a batch of these items, in this order; None if items are not numbered.
    """

    dataset: Any
    steps_per_epoch: int
    kept: int
    dropped: int
    chosen: Callable[[Sequence[int]], Batch] | None = None

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step is {step}; steps count from 0")
        return self.dataset[int(step)]


def require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def shuffled_batches(
    rows: list[Any], dropped: int, batch: Callable[[Sequence[Any]], Batch], size_name: str, size: int, seed: int
) -> Batches[Batch]:
    """Batches of rows by step, in a new order each epoch.

    Args:
      rows: all rows.
      dropped: number of items that were dropped before.
      batch: rows -> a batch.
      size_name, size: the number of rows in a batch, and its name in messages.
      seed: of the orders.

    Raises:
      ValueError: for fewer rows than a batch needs.
    """
    require_positive(size_name, size)
    if len(rows) < size:
        raise ValueError(
            f"{size_name} is {size}, but the source has only {counted(len(rows), 'item')} that fit; a step never has "
            f"the same prompt twice, so lower {size_name} or generate more items"
        )
    import grain  # takes a while to import

    epochs = grain.MapDataset.source(rows).seed(seed).shuffle().batch(size, drop_remainder=True, batch_fn=batch)
    return Batches(epochs.repeat(), steps_per_epoch=len(epochs), kept=len(rows), dropped=dropped)


def mixed_batches(
    sources: Mapping[str, tuple[list[Any], float]],
    dropped: int,
    batch: Callable[[Sequence[Any]], Batch],
    size_name: str,
    size: int,
    seed: int,
) -> Batches[Batch]:
    """Batches of rows from several sources by step, in proportion to their weights.

    Any consecutive rows have the share of each source to within one row. Each source has its own order, independent of
    the other sources and new in each pass over it; a row of a small source may occur more than once in a batch.

    Args:
      sources: name -> (rows, weight); each has at least one row.
      dropped, batch, size_name, size, seed: as for `shuffled_batches`.
    """
    require_positive(size_name, size)
    import grain

    streams = [
        grain.MapDataset.source(rows).seed((seed + zlib.crc32(name.encode())) % 2**32).shuffle().repeat()
        for name, (rows, _) in sources.items()
    ]
    count, weights = sum(len(rows) for rows, _ in sources.values()), [weight for _, weight in sources.values()]
    mixed = grain.MapDataset.mix(streams, weights=[weight / sum(weights) for weight in weights])
    return Batches(
        mixed.batch(size, batch_fn=batch), steps_per_epoch=max(count // size, 1), kept=count, dropped=dropped
    )
