"""Data sets of problems that a config names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm import data
from jaxrl_llm.config import Config
from jaxrl_llm.data import DataSet, DataSpec, Item, JsonlDataSet
from jaxrl_llm.data.json_files import contents, elements
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
        _, first = next(iter(elements(Path(config.data.path), contents(Path(config.data.path), "data.path"))))
    except (ValueError, StopIteration):  # said when the data are read
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


def own_data(stage: Any, last: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The data of a stage: what the run is evaluated on, and training problems of its own where it names others."""
    own, common = stage.parts.config, last.parts.config
    if not own.has_problems:
        return {}
    same = (own.task, own.data.path, own.data.fields, own.data.format) == (
        common.task,
        common.data.path,
        common.data.fields,
        common.data.format,
    )
    return data if same else data_sets(own)


def fingerprint_of(stages: Sequence[Any], sets: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of everything that a resumed run must find unchanged."""
    found = {split: part.fingerprint for split, part in data.items()} | stages[-1].parts.fingerprint()
    for stage in stages:
        if (own := sets[stage.name]) and own is not data:
            found[f"train of {stage.name}"] = own["train"].fingerprint
        found |= {f"source of {stage.name}": feed.file for feed in stage.parts.feeds if feed.file}
    return found
