"""Skipped updates with non-finite numbers: the term and rows that caused them, and the end of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.experience import FACTS, Experience
from jaxrl_llm.parallel import hosts
from jaxrl_llm.run.step_names import step_name

FOLDER = "failed"
_DESCRIPTION = "description.json"


class TrainingError(RuntimeError):
    """Training cannot continue; the message has the cause and the last good checkpoint."""


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Names of non-finite metrics, the terms of the loss before their sum."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    return sorted(bad, key=lambda name: (not name.startswith("loss/"), name.startswith(("gradient_norm", "parameter"))))


def blamed_rows(rows: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Rows with non-finite values, by field; NaN is allowed in fields where it means "does not apply"."""
    found = {}
    for name, values in rows.items():
        if np.issubdtype(values.dtype, np.floating) and name != "reward_components" and "/" not in name:
            rows_of = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            if len(rows_of):
                found[name] = rows_of.tolist()
    return found


def diagnosis(bad: Sequence[str], metrics: Mapping[str, float], blamed: Mapping[str, Sequence[int]]) -> str:
    """A clause with the non-finite numbers, the term and the rows."""
    first = bad[0]
    said = f"{first} is {metrics[first]}"
    if not blamed:
        return f"{said}, although every field of the rows is finite: it arises in the loss or its gradient"
    name, rows = min(blamed.items(), key=lambda entry: len(entry[1]))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{said}; field {name!r} is not finite in rows {', '.join(map(str, rows[:5]))}{more}"


def looked_at(run: Any, metrics: Mapping[str, Any], done: int, offset: int, stage: str, rows: Any) -> dict[str, float]:
    """Metrics of a step as floats; for a skipped update without the non-finite ones.

    An update with a non-finite loss or gradient was skipped by the optimiser; it is reported, and its batch is written.

    Args:
      run: `stages.Run`.
      metrics: of the step.
      done, offset: its index in the stage, and the number of steps before the stage.
      stage: its name.
      rows: `Experience` of the step.

    Raises:
      TrainingError: for too many skipped updates in a row, or an applied update with non-finite numbers; raised before
        a checkpoint is written.
    """
    shown = {name: float(value) for name, value in metrics.items()}
    bad = not_finite(shown)
    if not bad:
        run.skipped_in_a_row = 0
        return shown
    skipped = any(name == "loss" or name.startswith("gradient_norm") for name in bad)
    skipped &= not any(name.startswith("parameter_norm") for name in bad)
    run.skipped_in_a_row += skipped
    run.meta["skipped_updates"] = run.meta.get("skipped_updates", 0) + skipped
    held = hosts.host_copy(rows.known())
    said = f"{diagnosis(bad, shown, blamed_rows(held))} at {step_name(done, stage, offset)}"
    good, most = run.manager.latest_step(), run.config.faults.most_skipped_updates
    if hosts.is_main():
        file = written_batch(run.config.directory, held, {"step": offset + done, "stage": stage, "checkpoint": good})
        said += f"; its batch is in {file} (jaxrl replay {file})"
    if not skipped or run.skipped_in_a_row > most:
        rest = "There is no checkpoint yet" if good is None else f"The last good checkpoint is step {good}"
        way = "" if good is None else f": start from it with init_from={run.config.place} and another run_dir, and"
        many = f" {run.skipped_in_a_row} updates were skipped one after the other." if skipped else ""
        raise TrainingError(
            f"{said}.{many} {rest}{way} lower the learning rate, or check the rewards and the term that is named"
        )
    text = f"{said}. The update was skipped ({run.skipped_in_a_row} of {most} that may follow one another)"
    run.console.print(text, soft_wrap=True, markup=False)
    return {name: value for name, value in shown.items() if name not in bad} | {"skipped_update": 1.0}


def written_batch(directory: Path, rows: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> Path:
    """Write the rows of a failed step for `jaxrl replay`; returns the file."""
    path = directory / FOLDER / f"step_{described['step']:06d}.npz"
    path.parent.mkdir(exist_ok=True)
    narrow = {name: value.astype(np.float32) for name, value in rows.items() if value.dtype.name == "bfloat16"}
    arrays: dict[str, Any] = {_DESCRIPTION: np.array(json.dumps(described)), **rows, **narrow}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def read_batch(path: Path) -> tuple[dict[str, Any], Experience]:
    """Read a file of `written_batch`: its description and the rows.

    Raises:
      ValueError: for any other file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: jnp.asarray(stored[name]) for name in stored.files if name != _DESCRIPTION}
            described = json.loads(str(stored[_DESCRIPTION]))
        facts = {name: arrays.pop(name) for name in FACTS if name in arrays}
        return described, Experience(**facts, fields=arrays)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; give a file of RUN/{FOLDER}") from None
    except Exception:  # zipfile, NumPy and JSON raise different errors
        raise ValueError(f"{path} is not the batch of a failed step; give a file of RUN/{FOLDER}") from None
