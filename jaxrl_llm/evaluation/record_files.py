"""The directory of an evaluation: one line per problem, so that an interrupted evaluation can be continued.

settings.json    the settings that determine the samples; another evaluation is refused
problems.jsonl   one line per problem, with all of its samples
summary.json     the numbers, independent of interruptions
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

PROBLEMS, SETTINGS, SUMMARY = "problems.jsonl", "settings.json", "summary.json"


class RecordFile:
    """The records of an evaluation on disk.

    Args:
      directory: created if it does not exist.
      settings: plain data that determines the samples.

    Raises:
      ValueError: for a directory that cannot be written, or that holds an evaluation with other settings.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]):
        self.directory = Path(directory)
        wanted = json.loads(json.dumps(settings, default=str))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self.directory / SETTINGS
            held = json.loads(file.read_text()) if file.is_file() else None
            if held is None:
                file.write_text(json.dumps(wanted, indent=2) + "\n")
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--out {directory} cannot be used: {error}; give another directory") from None
        if held is not None and held != wanted:
            name = next(each for each in {**held, **wanted} if held.get(each) != wanted.get(each))
            raise ValueError(
                f"--out {directory} holds an evaluation with {name} {held.get(name)!r}, and this one has "
                f"{wanted.get(name)!r}; give another directory, or the same settings to go on with it"
            )

    def kept(self) -> list[dict[str, Any]]:
        """Existing records; an incomplete last line is removed."""
        file = self.directory / PROBLEMS
        whole = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        file.write_bytes(b"".join(line + b"\n" for line in whole))
        return [json.loads(line) for line in whole]

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the records of a batch in one write."""
        _append(self.directory / PROBLEMS, records)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the numbers."""
        (self.directory / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def stored_samples(directory: str | Path) -> int | None:
    """Samples per problem of the evaluation in a directory; None if there is none."""
    try:
        return int(json.loads((Path(directory) / SETTINGS).read_text())["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # reported when the directory is opened


def fresh_records(directory: str | Path) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """A function that writes the records of batches into a new problems.jsonl, replacing an existing one."""
    file = Path(directory) / PROBLEMS
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    return lambda records: _append(file, records)


def _append(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_problem_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of an evaluation's directory, or of its problems.jsonl.

    Raises:
      ValueError: if there are none, or a line is not a record.
    """
    file = Path(path)
    file = file / PROBLEMS if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f"{path} holds no {PROBLEMS}; give a directory that jaxrl eval --out wrote, or RUN/evaluations/after"
        )
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            assert {"item_id", "samples", "greedy"} <= record.keys()
        except (ValueError, AssertionError, AttributeError):
            raise ValueError(f"{file}, line {number} is not a record of an evaluation; evaluate again") from None
        records.append(record)
    if not records:
        raise ValueError(f"{file} is empty; evaluate again")
    return records


def params_fingerprint(params: PyTree) -> str:
    """A fingerprint of parameters, 16 hex digits, from sums over the bits of each array."""

    @jax.jit
    def sums(tree: PyTree) -> list[jax.Array]:
        found = []
        for leaf in jax.tree.leaves(tree):
            bits = jax.lax.bitcast_convert_type(leaf, {1: "uint8", 2: "uint16", 4: "uint32"}[leaf.dtype.itemsize])
            place = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
            found.append((bits.astype(jnp.uint32) * (2 * place + 1)).sum())
        return found

    digest = hashlib.sha256(np.asarray(jax.device_get(sums(params)), np.uint32).tobytes())
    return digest.hexdigest()[:16]


def items_fingerprint(items: Sequence[Mapping[str, Any]]) -> str:
    """A fingerprint of the problems in their order, 16 hex digits."""
    told = json.dumps([[item.get("item_id"), item["body"], item["answer"]] for item in items])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
