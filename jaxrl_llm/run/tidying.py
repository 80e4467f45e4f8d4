"""Manual work on checkpoints: deleting them, or writing them again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.run import checkpoints, frozen, stored_states


def prune(directory: Path, *, keep: int, keep_every_steps: int | None = None, within: Sequence[int] = ()) -> list[int]:
    """Delete all steps except the newest `keep`, multiples of `keep_every_steps`, and those of `within`; returns the
    deleted ones.

    Frozen parameters that no remaining step names are deleted too.
    """
    there = checkpoints.steps(directory)
    kept = {*there[-keep:], *within, *(step for step in there if keep_every_steps and step % keep_every_steps == 0)}
    gone = [step for step in there if step not in kept]
    for step in gone:
        shutil.rmtree(Path(directory) / str(step))
    for folder in frozen.unneeded(directory, checkpoints.steps(directory)):
        shutil.rmtree(folder)
    return gone


def converted(directory: Path, step: int, out: Path, *, network: str | None = None) -> Path:
    """Write a step again, with digests, as `out`/checkpoints/step beside its run's config.yaml.

    Args:
      directory: the checkpoints directory.
      step: one of its steps, of this version of the package or an earlier one.
      out: a directory that is empty or does not exist.
      network: write only the parameters of this network, which can be read but not trained further; None writes all.

    Raises:
      ValueError: when `out` is not empty, or there is no such network.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a new directory")
    state = stored_states.stored_arrays(directory, step, stored_states.stored_shapes(directory, step))
    if network is not None:
        if network not in state["networks"]:
            known = ", ".join(state["networks"])
            raise checkpoints.CheckpointError(
                f"checkpoint {directory}/{step} holds no network {network!r}; it has {known}"
            )
        state = {"networks": {network: {"params": state["networks"][network]["params"]}}}
    out.mkdir(parents=True, exist_ok=True)
    if (config := Path(directory).parent / "config.yaml").is_file():
        shutil.copy(config, out)
    with checkpoints.checkpoint_manager(out / "checkpoints", keep=1) as manager:
        checkpoints.save(manager, step, state, checkpoints.read_meta(directory, step))
    return out / "checkpoints" / str(step)
