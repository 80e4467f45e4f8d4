"""The checkpoint that a run resumes from: the newest undamaged one, compared with the records of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrl_llm.config import Config
from jaxrl_llm.experience import TrainState
from jaxrl_llm.models.model import Trained
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting.run_directory import last_step
from jaxrl_llm.run import checkpoints, integrity, stored_states
from jaxrl_llm.run.local_checkpoints import LocalCheckpoints, local_checkpoints, run_id
from jaxrl_llm.run.stages import Run


def resume_step(
    config: Config, *, exact: bool, first_saved: bool, say: Callable[[str], Any], apart: bool = False
) -> int | None:
    """The step of the checkpoint that a run resumes from; None starts at step 0. All processes must call it.

    Args:
      config: of the run.
      exact: refuse to resume from an earlier checkpoint than the newest.
      first_saved: the run saves its initial state before its first step.
      say: prints a message for the user.
      apart: each process has the run directory on its own disk.

    Raises:
      CheckpointError: if all checkpoints are damaged, or if there is none although steps were recorded.
    """
    folder = config.directory / "checkpoints"
    newest = integrity.newest_good(folder, exact=exact, say=say, apart=apart)
    recorded = last_step(config.directory / "metrics.jsonl")
    if newest is None:
        _require_no_records(folder, recorded, 0 if first_saved else config.checkpoints.every_steps)
    elif hosts.is_main() and (recorded or 0) < newest:
        there = "has no records" if recorded is None else f"ends at step {recorded}"
        say(
            f"warning: {config.directory}/metrics.jsonl {there}, but the checkpoint is of step {newest}: the records "
            "between them are lost; the other records are kept"
        )
    return newest


def _require_no_records(folder: Path, recorded: int | None, first_save: int) -> None:
    """Raises CheckpointError if steps were recorded but their checkpoints are missing."""
    unfinished = folder.is_dir() and any("orbax-checkpoint-tmp" in path.name for path in folder.iterdir())
    if recorded is None or unfinished or (folder.is_dir() and recorded <= first_save):
        return
    raise checkpoints.CheckpointError(
        f"{folder.parent} has records up to step {recorded}, but no checkpoint in {folder.name}/, so resuming would "
        "start at step 0 and delete them; restore the checkpoints from a copy, or start a new run with another run_dir"
    )


def move_damaged(config: Config, newest: int | None, say: Callable[[str], Any], *, apart: bool = False) -> None:
    """Move checkpoints after step `newest` out of `checkpoints`. All processes must call it.

    The main process moves them; with `apart`, each process on its own disk.
    """
    if hosts.is_main() or apart:
        for moved in integrity.set_aside(config.directory / "checkpoints", -1 if newest is None else newest):
            say(f"damaged checkpoint moved to {moved}")
    hosts.meet("damaged checkpoints are moved")


def with_local(
    config: Config, mesh: Any, newest: int | None, meta: dict[str, Any], say: Callable[[str], Any]
) -> tuple[LocalCheckpoints | None, int | None, dict[str, Any]]:
    """(local checkpoints of this host, the step to resume from, its metadata). All processes must call it.

    Args:
      config: of the run.
      mesh: of the devices that hold its state.
      newest: step of the newest checkpoint in the run directory; None starts the run at step 0.
      meta: of that checkpoint, or of the new run.
      say: prints a message if the run resumes from a later local checkpoint, which every host must have.
    """
    if config.checkpoints.local_dir is None:
        return None, newest, meta
    meta = meta | {"run_id": run_id(meta)}
    local = local_checkpoints(config.checkpoints.local_dir, meta["run_id"], meta["config_hash"], mesh, say)
    later = None if newest is None else local.agreed(newest)
    if later is None:
        return local, newest, meta
    say(f"resuming from the local checkpoint of step {later}; the run directory has step {newest}")
    return local, later, local.meta(later) | {"placement": meta["placement"]}


def restored_state(run: Run, step: int, like: TrainState, trained: Trained | None) -> TrainState:
    """The state of a step: from the run directory, or from the local checkpoint if only that has the step."""
    folder = run.config.directory / "checkpoints"
    if run.local is None or step in checkpoints.steps(folder):
        return stored_states.restore(folder, step, like, trained=trained)
    state = run.local.restore(step, checkpoints.learned_part(like, trained))
    return checkpoints.with_frozen_part(state, like, trained)
