"""The run directory: everything that a run leaves behind, in files that other programs can read.

    config.yaml      the config as the run used it
    metrics.jsonl    one JSON object a line: {"step": global step, name: number, ...}
    samples.jsonl    one JSON object a line: {"step": global step, ...} with whatever describes a sample
    starts.jsonl     how long each start of the run has lived, written as it goes
    summary.json     the result, written once and whole
    tensorboard/     the numbers of metrics.jsonl as TensorBoard events

Resuming at step s takes back every record after s, so that a run that was killed and resumed leaves the same lines as
one that was not, but for what the machine says (`metric_table.OF_MACHINE`: time, memory). For this, write the records
of a step before the checkpoint of that step, and `sync` in between.
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
    """The open files of one run; on several hosts one process opens it. A context manager.

        with RunDirectory("runs/demo", config) as run:
            run.write_metrics(1, {"loss": loss, "reward": reward})

    Args:
      path: a local (or mounted) directory; made if it does not exist.
      config: the config of the run, written to config.yaml.
      resume_step: None starts a run in an empty directory. A number resumes the run that is in the directory after
        that global step, the step of the checkpoint that was restored.
      loggers: what opens further loggers, by name; None for TensorBoard. One that fails later gets nothing more.
      warn: is told of it.

    Raises:
      ValueError: starting a run where something lies already, resuming one where nothing does, an address such as
        gs://..., or a damaged record file.
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
                    f"run_dir={str(path)!r} holds no config.yaml, so there is no run to resume: name the directory of "
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
        """Append one line to metrics.jsonl, and hand its numbers to the loggers.

        Args:
          step: global step, counted over all stages of the run.
          metrics: numbers (Python, numpy or jax scalars), or text that goes to metrics.jsonl only.
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
          samples: what describes each: prompt, completion, reward and the like; arrays become lists.
        """
        records = [_record(step, sample) for sample in samples]
        self._append("samples.jsonl", records)
        for logger in self._loggers:
            logger.call("samples", int(step), [{n: v for n, v in record.items() if n != "step"} for record in records])

    def write_start(self, record: Mapping[str, Any]) -> None:
        """Append a line to starts.jsonl, which no resumption takes back."""
        with (self.path / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        write_summary(self.path, summary)

    def sync(self) -> None:
        """Force every record onto the disk: call it before the checkpoint of the same step is saved.

        Raises:
          FileNotFoundError: when the directory was moved or deleted; what is written would be seen by nobody.
        """
        for name, file in self._records.items():
            os.fsync(file.fileno())
            os.stat(self.path / name)
        for logger in self._loggers:
            logger.call("sync")

    def close(self) -> None:
        """Close the files; closing twice does no harm."""
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
        # One write a call: a reader who follows the file, or a kill, sees whole lines wherever the system allows it.
        file = self._records[name]
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        file.flush()


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Write summary.json into a run directory through a temporary file, so that it is whole or not there.

    Args:
      path: the run directory, which exists.
      summary: nested mappings and lists of numbers and text; numpy and jax values are converted.
    """
    _write_atomically(_local(path) / "summary.json", json.dumps(_plain(summary), indent=2, ensure_ascii=False) + "\n")


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or samples.jsonl, without a half-written last line.

    A number that is not finite is written, and read back, as NaN, Infinity or -Infinity.

    Args:
      path: the file; one that does not exist has no records.

    Raises:
      ValueError: a line other than the last is not a record.
    """
    return [record for _, record in _records(Path(path))]


def last_step(path: str | os.PathLike) -> int | None:
    """The last step of a metrics.jsonl or samples.jsonl; None where it records none.

    Raises:
      ValueError: a line other than the last is not a record.
    """
    return max((record["step"] for _, record in _records(Path(path))), default=None)


def truncate_records(path: str | os.PathLike, step: int) -> int:
    """Take back the records of a file after a global step, and a half-written last line.

    Args:
      path: a metrics.jsonl or samples.jsonl; one that does not exist stays so.
      step: the last global step whose records stay.

    Returns:
      The number of records that were dropped.

    Raises:
      ValueError: a line other than the last is not a record.
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
            # Without its line end the last line may be cut short and yet be JSON ("12" of "123").
            if not line.endswith(b"\n"):
                return
            try:
                text = line.decode("utf-8").removesuffix("\n")
                record = json.loads(text)
                if not isinstance(record["step"], int):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}, line {number}: {line[:80]!r} is not a JSON object with a whole number `step`. The file "
                    "was damaged or written by something else: repair or delete that line, then resume."
                ) from None
            yield text, record


def _record(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    if "step" in values:
        raise ValueError(
            f"'step' is among the names {sorted(values)}: the global step is passed apart, rename the other."
        )
    return {"step": int(step), **_plain(values)}


def _plain(value: Any) -> Any:
    """Python's own numbers, text, lists and dicts in place of numpy's, jax's and others."""
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
            # The shortest decimal that is this float32: 0.1, where a cast to float64 would write 0.10000000149011612.
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
            "mounted directory, and a `Mirror` of it brings them to the address."
        )
    return Path(path)


def require_empty(path: Path) -> None:
    """Raises ValueError where a new run would be mixed with what lies at the path."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"run_dir={str(path)!r} is a file: give a directory that is empty or does not exist.")
    found = sorted({entry.name for entry in path.iterdir()} - {FILE}) if path.exists() else []
    if found:
        raise ValueError(
            f"run_dir={str(path)!r} is not empty (it holds {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}), "
            "and a new run would mix its records with those: resume the run that is there, give another run_dir, or "
            "remove this one."
        )


def _write_atomically(path: Path, text: str) -> None:
    # In the same directory, because a rename is atomic only within one file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a run's records are for everyone whom the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
