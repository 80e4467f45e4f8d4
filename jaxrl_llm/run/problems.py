"""Data sets of problems that a config names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm import data
from jaxrl_llm.config import Config
from jaxrl_llm.data import DataSet, DataSpec, Item, JsonlDataSet
from jaxrl_llm.data.json_files import elements
from jaxrl_llm.data.jsonl import SPLITS
from jaxrl_llm.training.reading import columns_of


def data_directory(config: Config) -> Path:
    """Where data sets are kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(config.data.directory) if config.data.directory else cache / "jaxrl_llm" / "data"


def columns(config: Config) -> frozenset[str]:
    """What readings may ask of a record by name: its own fields, and those of the first line of a file."""
    if config.data.path is None:
        return frozenset() if config.task is None else columns_of([dict.fromkeys(Item.__dataclass_fields__)])
    try:
        content = Path(config.data.path).expanduser().read_bytes()
        _, first = next(iter(elements(Path(config.data.path), content)))
    except (OSError, ValueError, StopIteration):  # said when the data are read
        return frozenset()
    return columns_of([{"raw": first}] if isinstance(first, dict) else [])


def data_sets(config: Config, splits: Sequence[str] = SPLITS) -> dict[str, DataSet | JsonlDataSet]:
    """The problems of splits, by name; generated ones are written on first use, and those of `splits` alone.

    Raises:
      ValueError: for a file that cannot be used, or a config without problems.
    """
    task, own = config.task, config.data
    if own.path is not None:
        fields = data.fields_of(own.format, **own.fields)
        sets = data.jsonl_data_sets(own.path, fields, validation_path=own.validation_path, test_path=own.test_path)
        return {split: sets[split] for split in splits}
    if task is None:
        raise ValueError("this config has no problems; name a built-in task in section task, or a file in data.path")
    counts = {"train": task.train_items, "validation": task.validation_items, "test": task.test_items}
    return {
        split: data.data_set(
            DataSpec(task.name, task.levels, split, counts[split], task.seed, task.options), str(data_directory(config))
        )
        for split in splits
    }
