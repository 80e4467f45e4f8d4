"""The order of rows in the steps of a run: a pure function of (seed, step), of one set or a weighted mixture.

Nothing is remembered between steps, and nothing depends on the number of hosts: each reads whole batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Batches(Generic[Batch]):
    """Batches by step, without end: `batches[step]` is the same whatever was read before.

    Each epoch has its own order. Rows that do not fill a whole batch at the end of an epoch wait for another epoch, so
    that no step holds the same prompt twice.

    Attributes:
      dataset: the grain pipeline.
      steps_per_epoch: batches in one pass over the data.
      kept: items in the data.
      dropped: items left out because they are too long.
      chosen: (numbers of items) -> a batch of those, in their order; None where items are not numbered.
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
      rows: what is batched.
      dropped: what was left out before.
      batch: rows -> a batch.
      size_name, size: rows of a batch, and what messages call that.
      seed: of the orders.

    Raises:
      ValueError: for fewer rows than a batch holds.
    """
    require_positive(size_name, size)
    if len(rows) < size:
        raise ValueError(
            f"{size_name} is {size}, but the source has only {len(rows)} items that fit; a step never holds the same "
            f"prompt twice, so lower {size_name} or generate more items"
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
    """Batches of rows of several sources by step, in shares that follow weights.

    Any stretch of rows has of each source its share of the weights, to within a row. Each source has its own order,
    which is new each time that it is used up, whatever the others are; a row of a small one may stand in a batch more
    than once.

    Args:
      sources: name -> (rows, weight); each has a row at least.
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
