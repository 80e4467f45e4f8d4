"""The run directory: the output of a run, in files that other programs can read.

    config.yaml      the config of the run
    metrics.jsonl    one JSON object per line: {"step": global step, name: number, ...}
    samples.jsonl    one JSON object per line: {"step": global step, ...} with the fields of a sample
    starts.jsonl     the duration of each start of the run, updated while it runs
    summary.json     the result, written once, atomically
    tensorboard/     the numbers of metrics.jsonl as TensorBoard events

Resuming at step s removes every record after s, so that a run that was killed and resumed has the same lines as one
that was not, except for measurements of the machine (`metric_table.OF_MACHINE`: time, memory). This requires that the
records of a step are written before its checkpoint, with `sync` in between.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxrl_llm.reporting.loggers import Guarded, Opener, TensorBoard
from jaxrl_llm.reporting.ownership import FILE

_LOG = logging.getLogger(__name__)
RECORD_FILES = ("metrics.jsonl", "samples.jsonl")
STARTS = "starts.jsonl"


class RunDirectory:
    """The open files of one run; with several hosts, one process opens it. A context manager.

        with RunDirectory("runs/demo", config) as run:
            run.write_metrics(1, {"loss": loss, "reward": reward})

    Args:
      path: a local (or mounted) directory; created if it does not exist.
      config: the config of the run, written to config.yaml.
      resume_step: None starts a run in an empty directory. A number resumes the run in the directory after that global
        step, which is the step of the restored checkpoint.
      loggers: name -> function that opens a further logger; None for TensorBoard. A logger that fails is not used
        again.
      warn: called with a message if a logger fails.

    Raises:
      ValueError: if a new run's directory is not empty, a resumed run's directory has no run, the path is an address
        such as gs://..., or a record file is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: Mapping[str, Any],
        *,
        resume_step: int | None = None,
        loggers: Mapping[str, Opener] | None = None,
        warn: Callable[[str], Any] = _LOG.warning,
    ):
        self.path = _local(path)
        if resume_step is None:
            require_empty(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            if not (self.path / "config.yaml").is_file():
                raise ValueError(
                    f"run_dir={str(path)!r} has no config.yaml, so there is no run to resume: give the directory of "
                    "the run, or start a new one without resuming."
                )
            for name in RECORD_FILES:
                truncate_records(self.path / name, resume_step)
        _write_atomically(
            self.path / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        )
        openers = {"tensorboard": TensorBoard} if loggers is None else loggers
        place = self.path, _plain(config), resume_step
        self._loggers = [Guarded(name, opener, place, warn) for name, opener in openers.items()]
        self._records = {name: (self.path / name).open("a", encoding="utf-8") for name in RECORD_FILES}

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, and log its numbers.

        Args:
          step: global step, counted over all stages of the run.
          metrics: numbers (Python, numpy or jax scalars), or text, which is written only to metrics.jsonl.
        """
        record = _record(step, metrics)
        self._append("metrics.jsonl", [record])
        numbers = {n: v for n, v in record.items() if n != "step" and isinstance(v, int | float)}
        for logger in self._loggers:
            logger.call("log", record["step"], numbers)

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append one line for each sample to samples.jsonl.

        Args:
          step: global step at which the samples were drawn.
          samples: the fields of each sample, such as prompt, completion and reward; arrays become lists.
        """
        records = [_record(step, sample) for sample in samples]
        self._append("samples.jsonl", records)
        for logger in self._loggers:
            logger.call("samples", int(step), [{n: v for n, v in record.items() if n != "step"} for record in records])

    def write_start(self, record: Mapping[str, Any]) -> None:
        """Append a line to starts.jsonl, which resuming does not truncate."""
        with (self.path / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json atomically."""
        write_summary(self.path, summary)

    def sync(self) -> None:
        """Force all records onto the disk; call it before the checkpoint of the same step is saved.

        Raises:
          FileNotFoundError: if the directory was moved or deleted, so that the records would be lost.
        """
        for name, file in self._records.items():
            os.fsync(file.fileno())
            os.stat(self.path / name)
        for logger in self._loggers:
            logger.call("sync")

    def close(self) -> None:
        """Close the files; may be called twice."""
        for file in self._records.values():
            file.close()
        for logger in self._loggers:
            logger.call("close")
        self._loggers = []

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        # One write per call, so that a reader of the file, or a kill, usually finds complete lines.
        file = self._records[name]
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        file.flush()


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Write summary.json into a run directory atomically, by renaming a temporary file.

    Args:
      path: an existing run directory.
      summary: nested mappings and lists of numbers and text; numpy and jax values are converted.
    """
    _write_atomically(_local(path) / "summary.json", json.dumps(_plain(summary), indent=2, ensure_ascii=False) + "\n")


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or samples.jsonl, without an incomplete last line.

    Numbers that are not finite are stored as NaN, Infinity or -Infinity.

    Args:
      path: the file; a missing file has no records.

    Raises:
      ValueError: if a line other than the last is not a record.
    """
    return [record for _, record in _records(Path(path))]


def last_step(path: str | os.PathLike) -> int | None:
    """The last step in a metrics.jsonl or samples.jsonl; None if it has no records.

    Raises:
      ValueError: if a line other than the last is not a record.
    """
    return max((record["step"] for _, record in _records(Path(path))), default=None)


def truncate_records(path: str | os.PathLike, step: int) -> int:
    """Remove the records of a file after a global step, and an incomplete last line.

    Args:
      path: a metrics.jsonl or samples.jsonl; it may be missing.
      step: the last global step whose records are kept.

    Returns:
      The number of removed records.

    Raises:
      ValueError: if a line other than the last is not a record.
    """
    path = Path(path)
    if not path.exists():
        return 0
    records = list(_records(path))
    kept = [line for line, record in records if record["step"] <= step]
    _write_atomically(path, "".join(line + "\n" for line in kept))
    return len(records) - len(kept)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            # Without its line end the last line may be truncated but still valid JSON ("12" of "123").
            if not line.endswith(b"\n"):
                return
            try:
                text = line.decode("utf-8").removesuffix("\n")
                record = json.loads(text)
                if not isinstance(record["step"], int):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}, line {number}: {line[:80]!r} is not a JSON object with an integer `step`. The file was "
                    "damaged or written by another program: repair or delete that line, then resume."
                ) from None
            yield text, record


def _record(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    if "step" in values:
        raise ValueError(
            f"'step' is among the names {sorted(values)}: the global step is a separate argument, rename the other."
        )
    return {"step": int(step), **_plain(values)}


def _plain(value: Any) -> Any:
    """A value with numbers and arrays of numpy, jax and others converted to Python numbers, text, lists and dicts."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _named(name, entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind in "biuUS":
            return array.tolist()
        if array.dtype == np.float64:
            return array.tolist()
        if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
            # The shortest decimal of this float32: 0.1, where a cast to float64 would give 0.10000000149011612.
            return _nested(array.astype(np.float32))
    raise ValueError(
        f"a value of type {type(value).__name__} cannot be written as JSON: pass numbers, text, lists or dicts."
    )


def _named(name: Any, value: Any) -> Any:
    try:
        return _plain(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _nested(array: np.ndarray) -> Any:
    return float(str(array[()])) if array.ndim == 0 else [_nested(entry) for entry in array]


def _local(path: str | os.PathLike) -> Path:
    if re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(path)):
        raise ValueError(
            f"run_dir={os.fspath(path)!r} is an address, but records are appended to local files: give a local or "
            "mounted directory, and use a `Mirror` to upload it to the address."
        )
    return Path(path)


def require_empty(path: Path) -> None:
    """Raises ValueError if a path has files, with which the files of a new run would be mixed."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"run_dir={str(path)!r} is a file: give a directory that is empty or does not exist.")
    found = sorted({entry.name for entry in path.iterdir()} - {FILE}) if path.exists() else []
    if found:
        raise ValueError(
            f"run_dir={str(path)!r} is not empty (it has {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}), "
            "and a new run would mix its records with those: resume the existing run, give another run_dir, or remove "
            "this one."
        )


def _write_atomically(path: Path, text: str) -> None:
    # In the same directory, since a rename is atomic only within one file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates files that only the owner can read; use the permissions of the umask instead.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
