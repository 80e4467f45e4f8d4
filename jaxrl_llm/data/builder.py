"""Data sets on disk: a specification is written once as a TFDS data set and read back by random access.

The directory's name holds a hash of the whole specification, so another specification never reuses the files. TFDS
writes into a temporary directory and renames it at the end, so a killed write leaves no readable data set.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxrl_llm.data import tasks
from jaxrl_llm.data.tasks.items import GENERATOR_VERSION, SPLITS, Item, record, require_choice, require_int


@dataclass(frozen=True)
class DataSpec:
    """Specification of a data set; equal specifications give the same items, byte for byte.

    Attributes:
      task: name of a task family, see `tasks.names()`.
      levels: levels of the items; each has the same share of them.
      split: "train", "validation", "test" or "extrapolation".
      count: number of items in all levels together.
      seed: seed of the generators.
      options: options of the task; missing ones have their defaults.
    """

    task: str
    levels: tuple[int, ...]
    split: str
    count: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        levels = tuple(self.levels) if isinstance(self.levels, Sequence) else (self.levels,)
        if not levels or len(set(levels)) != len(levels):
            raise ValueError(f"levels is {self.levels!r}; it must have at least one level, and each only once")
        for level in levels:
            require_int("levels", level)
        require_int("count", self.count, low=len(levels))
        require_int("seed", self.seed)
        require_choice("split", self.split, SPLITS)
        object.__setattr__(self, "levels", levels)
        # Defaults are filled in, so that stating a default gives the same specification as omitting it.
        object.__setattr__(self, "options", dict(tasks.task(self.task, **self.options).options))

    @property
    def canonical(self) -> str:
        """The specification as text; equal specifications give equal text."""
        fields = {name: getattr(self, name) for name in ("task", "levels", "split", "count", "seed", "options")}
        return json.dumps(fields | {"generator_version": GENERATOR_VERSION}, sort_keys=True)

    @property
    def name(self) -> str:
        """Directory name: readable in front, a hash of the whole specification behind."""
        digest = hashlib.sha256(self.canonical.encode()).hexdigest()[:16]
        return f"{self.task}-{self.split}-{digest}"

    def items(self) -> list[Item]:
        """Generate the items, level by level; the position in the list is the item's id."""
        task = tasks.task(self.task, **self.options)
        share, rest = divmod(self.count, len(self.levels))
        counts = [share + (number < rest) for number in range(len(self.levels))]
        return [
            item
            for level, count in zip(self.levels, counts, strict=True)
            for item in task.generate(level=level, count=count, seed=self.seed, split=self.split)
        ]


@dataclass(frozen=True)
class DataSet(Sequence[dict[str, Any]]):
    """A data set that can be read by index; `DataSet[i]` is the record whose `item_id` is i.

    Attributes:
      spec: its specification.
      directory: of its files.
      source: the TFDS data source.
      fingerprint: hash over the specification and the content, for checkpoints.
    """

    spec: DataSpec
    directory: str
    source: Any
    fingerprint: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.source):  # ends iteration
            raise IndexError(f"item {index} of {len(self.source)}")
        return self._whole(record(self.source[index], index))

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._whole(each) for each in self.stored(indices)]

    def stored(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records as stored on disk, without derived columns."""
        elements = zip(self.source.__getitems__(indices), indices, strict=True)
        return [record(element, index) for element, index in elements]

    @cached_property
    def _columns(self) -> Any:
        return tasks.task(self.spec.task, **self.spec.options).columns

    def _whole(self, stored: dict[str, Any]) -> dict[str, Any]:
        return stored if self._columns is None else {**stored, **self._columns(stored)}


def fingerprint(spec: DataSpec, records: Sequence[Mapping[str, Any]]) -> str:
    """Hash over a specification and the content of its records."""
    digest = hashlib.sha256(spec.canonical.encode())
    for fields in records:
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()


def data_set(spec: DataSpec, data_dir: str) -> DataSet:
    """The data set of a specification, written under `data_dir` if it does not exist.

    Args:
      spec: its specification.
      data_dir: directory of all data sets; created if missing.

    Raises:
      ValueError: if the task has too few distinct items, or if the files on disk were changed.
    """
    builder: Any = _builder(spec, data_dir)
    if not builder.data_path.exists():
        builder = _written(spec, data_dir, builder)
    with _quiet():
        source = builder.as_data_source(split=spec.split)
    dataset = DataSet(spec, str(builder.data_path), source, builder.info.metadata.get("fingerprint", ""))
    found = fingerprint(spec, dataset.stored(range(len(dataset))))
    if len(dataset) != spec.count or found != dataset.fingerprint:
        raise ValueError(
            f"the data set in {dataset.directory} has {len(dataset)} items with the fingerprint {found}, but "
            f"{spec.count} items with the fingerprint {dataset.fingerprint} were written; delete this directory, and "
            "it will be written again"
        )
    return dataset


def _builder(spec: DataSpec, data_dir: str) -> Any:
    from jaxrl_llm.data.task_items import TaskItems, TaskItemsConfig  # TFDS takes a while to import

    config = TaskItemsConfig(name=spec.name, spec=spec)
    with _quiet():
        return TaskItems(data_dir=data_dir, config=config, file_format="array_record")


def _written(spec: DataSpec, data_dir: str, builder: Any) -> Any:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with _quiet():
            builder.download_and_prepare(download_config=config)
    except OSError:
        # Another process of the run may have renamed its own copy into place first; both copies are equal.
        if not builder.data_path.exists():
            raise
    return _builder(spec, data_dir)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output of TFDS, so that the terminal shows only the progress of the run."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
