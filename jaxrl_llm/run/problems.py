"""Data sets of problems that a config names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm import data
from jaxrl_llm.bounds import counted
from jaxrl_llm.config import Config, RowsConfig, TaskConfig
from jaxrl_llm.data import DataSet, DataSpec, Item, ProblemSet, Task
from jaxrl_llm.data.row_files import SPLITS, first_row
from jaxrl_llm.data.row_templates import rendered
from jaxrl_llm.training.reading import columns_of


def data_directory(config: Config) -> Path:
    """The directory of generated data sets."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(config.data.directory) if config.data.directory else cache / "jaxrl_llm" / "data"


def columns(config: Config) -> frozenset[str]:
    """Names that readings may read from a record: its fields, and the columns of the first row of each source."""
    own = config.data
    found: dict[str, Any] = {"template": None} if own.templates else {}
    found |= {"data_source": None} if own.sources or own.templates else {}
    if own.path is None and not own.sources:
        return frozenset() if config.task is None else columns_of([found | _of_task(config.task)])
    for one in own.sources.values():
        found |= _of_task(one.task) if one.path is None else {}
    for path in [one.path for one in (own, *own.sources.values()) if one.path is not None]:
        with contextlib.suppress(OSError, ValueError):  # reported when the data are read
            first = first_row(path)
            found |= first if isinstance(first, dict) else {}
    return columns_of([{"raw": found}])


def configured_task(config: TaskConfig) -> Task:
    """The task of section task.

    Raises:
      ValueError: for an unknown task, option or level.
    """
    try:
        made = data.tasks.task(config.name, **config.options)
    except ValueError as error:
        raise ValueError(f"task: {error}") from None
    if outside := [level for level in config.levels if level not in made.levels]:
        raise ValueError(
            f"task.levels is {list(config.levels)}, but {made.name} has the levels {made.levels[0]} to "
            f"{made.levels[-1]}; leave out {outside[0]}"
        )
    return made


@contextlib.contextmanager
def naming_unreadable_data(config: Config) -> Iterator[None]:
    """Replaces an error within by that of a data file that cannot be read: then its columns are unknown, and the error
    may be a consequence."""
    try:
        yield
    except ValueError:
        for path in [one.path for one in (config.data, *config.data.sources.values()) if one.path is not None]:
            first_row(path)
        raise


def _of_task(task: TaskConfig | None) -> dict[str, Any]:
    """What the records of a built-in task hold, and the columns that it makes of them."""
    found: dict[str, Any] = dict.fromkeys(Item.__dataclass_fields__)
    made = None if task is None else data.tasks.task(task.name, **task.options)
    if made is not None and made.columns is not None:
        found |= made.columns(data.tasks.record(made.generate(level=made.levels[0], count=1)[0], 0))
    return found


def data_sets(
    config: Config, splits: Sequence[str] = SPLITS, *, overlap: Literal["error", "drop", "keep"] | None = None
) -> dict[str, DataSet | ProblemSet]:
    """The problems of the given splits, by name; generated ones are written on first use.

    Args:
      config: of a run or a stage.
      splits: of "train", "validation" and "test".
      overlap: replaces `data.overlap`.

    Raises:
      ValueError: for unusable data, or a config without problems.
    """
    own, overlap = config.data, overlap or config.data.overlap
    read = SPLITS if own.sources or own.few_shot.examples else splits
    if own.sources:
        parts = {name: _source(config, one, one.task, read, overlap) for name, one in own.sources.items()}
        sets: Any = data.mixture(parts, [one.weight for one in own.sources.values() if one.weight], overlap=overlap)
    else:
        sets = _source(config, own, config.task, read, overlap)
    found: Any = {split: sets[split] for split in splits}
    if (book := own.handbook) is not None:
        found = data.with_handbook(found, book.entries, book.path, count=book.count, by=book.by, line=book.line)
    if own.templates:
        found = data.with_templates(found, own.templates)
    if own.privileged is not None:
        found = data.with_column(found, "privileged", own.privileged)
    if own.response is not None:
        _require_one_completion(config)
        found = data.with_column(found, "response", own.response, of_prompt=False)
    return found


def _require_one_completion(config: Config) -> None:
    """Raise ValueError for data.response with a task whose demonstrations are conversations."""
    task = config.task
    if task is not None and data.tasks.task(task.name, **task.options).segments is not None:
        raise ValueError(f"data.response is set, but {task.name} is answered in turns; leave it out")


def _source(
    config: Config, own: RowsConfig, task: TaskConfig | None, splits: Sequence[str], overlap: Any
) -> Mapping[str, Any]:
    """The splits of one source."""
    if task is not None and config.task is None:
        _require_single_answers(task)
    if own.path is not None:
        fields, where = data.fields_of(own.format, **own.fields), own.where
        where = (where,) if isinstance(where, str) else tuple(where)
        refining = data.Refining(where, own.limit, own.duplicates, overlap, own.unusable)
        paths = {"validation_path": own.validation_path, "test_path": own.test_path}
        sets: Mapping[str, Any] = data.problem_sets(own.path, fields, refining=refining, **paths)
    elif task is not None:
        counts = {"train": task.train_items, "validation": task.validation_items, "test": task.test_items}
        sets = {
            split: data.data_set(
                DataSpec(task.name, task.levels, split, counts[split], task.seed, task.options),
                str(data_directory(config)),
            )
            for split in splits
        }
        if config.task is None:  # there is no task to write reference completions
            made = data.tasks.task(task.name, **task.options)
            sets = {
                split: data.ProblemSet(
                    one.directory,
                    split,
                    tuple({**each, "response": made.response(each).removesuffix("<eos>")} for each in one),
                    one.fingerprint,
                )
                for split, one in sets.items()
            }
    else:
        raise ValueError("this config has no problems; name a built-in task in section task, or a file in data.path")
    shots = config.data.few_shot
    if not shots.examples:
        return sets

    def shown(record: Mapping[str, Any]) -> str:
        prompt = config.data.prompt_format.replace("{body}", record["body"])
        response = record.get("response") or record["answer"]
        own_columns = {**record.get("raw", {}), "prompt": prompt, "answer": record["answer"], "response": response}
        return rendered(shots.template, own_columns)

    given = None
    if shots.path is not None:
        given = data.read_records(shots.path, data.fields_of(own.format, **own.fields))[0]
    return data.with_examples(sets, shots.examples, shown, given)


def _require_single_answers(task: TaskConfig) -> None:
    """Raise ValueError for a task in turns in a mixture."""
    made = data.tasks.task(task.name, **task.options)
    if made.environment is not None or made.segments is not None:
        raise ValueError(
            f"data.sources has the task {task.name!r}, which is in turns, but a mixture needs single completions; "
            "train on it in a separate stage, with section task"
        )


def left_out(
    sets: Mapping[str, Any], prompts: Mapping[str, Any], max_prompt_tokens: int, files: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """Lines that say which rows were left out of each split and why.

    Args:
      sets: problems by split.
      prompts: batches of prompts by stage.
      max_prompt_tokens: their limit.
      files: omitted rows of judged completions, by stage and reason.
    """
    lines = [
        f"{split}: {counted(len(one), 'problem')}; left out "
        + ", ".join(f"{count:,} ({why})" for why, count in dropped.items())
        for split, one in sets.items()
        if (dropped := getattr(one, "dropped", {}))
    ]
    long = max((one.dropped for one in prompts.values()), default=0)
    lines += [
        f"{name}: left out " + ", ".join(f"{n:,} ({why})" for why, n in gone.items()) for name, gone in files.items()
    ]
    said = f"dropped {counted(long, 'prompt')} longer than {max_prompt_tokens} tokens"
    return [*lines, *([said] if long else [])]


def own_data(stage: Any, last: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The data of a stage: the run's evaluation data, and its own training problems if it names others."""
    own, common = stage.parts.config, last.parts.config
    if not own.has_problems:
        return {}
    same = own.task == common.task and replace(own.data, selection=None) == replace(common.data, selection=None)
    return data if same else data_sets(own)


def fingerprint_of(stages: Sequence[Any], sets: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of all files that must be unchanged for a resume."""
    found = {split: part.fingerprint for split, part in data.items()} | stages[-1].parts.fingerprint()
    for stage in stages:
        if (own := sets[stage.name]) and own is not data:
            found[f"train of {stage.name}"] = own["train"].fingerprint
        found |= {f"source of {stage.name}": feed.file for feed in stage.parts.feeds if feed.file}
    return found
