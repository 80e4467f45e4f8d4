"""Where a run goes on from: its newest good checkpoint, with records that agree with it, or with a refusal."""

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


def step_to_go_on_from(
    config: Config, *, exact: bool, first_saved: bool, say: Callable[[str], Any], apart: bool = False
) -> int | None:
    """The step whose checkpoint a run goes on from; None begins it anew. All processes must call it.

    Args:
      config: of the run.
      exact: refuse to go on from an earlier checkpoint than the newest.
      first_saved: the run saves its first state before its first step.
      say: tells people what was found.
      apart: each process has the run on a disk of its own.

    Raises:
      CheckpointError: when no checkpoint is good, or there is none although there are records of steps.
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
            "in between are lost; what there is is kept"
        )
    return newest


def _require_no_records(folder: Path, recorded: int | None, first_save: int) -> None:
    """Raises CheckpointError where steps were recorded, and checkpoints that must have been written are gone."""
    unfinished = folder.is_dir() and any("orbax-checkpoint-tmp" in path.name for path in folder.iterdir())
    if recorded is None or unfinished or (folder.is_dir() and recorded <= first_save):
        return
    raise checkpoints.CheckpointError(
        f"{folder.parent} has records up to step {recorded}, but no checkpoint in {folder.name}/, so going on would "
        "begin at step 0 and erase them; restore the checkpoints from a copy, or start a new run with another run_dir"
    )


def clear_the_way(config: Config, newest: int | None, say: Callable[[str], Any], *, apart: bool = False) -> None:
    """Move checkpoints that the run cannot go on from out of `checkpoints`, one or each (`apart`). All must call it."""
    if hosts.is_main() or apart:
        for moved in integrity.set_aside(config.directory / "checkpoints", -1 if newest is None else newest):
            say(f"damaged checkpoint moved to {moved}")
    hosts.meet("damaged checkpoints are out of the way")


def with_local(
    config: Config, mesh: Any, newest: int | None, meta: dict[str, Any], say: Callable[[str], Any]
) -> tuple[LocalCheckpoints | None, int | None, dict[str, Any]]:
    """(checkpoints of this host, the step that the run goes on from, its meta). All processes must call it.

    Args:
      config: of the run.
      mesh: that its state lies on.
      newest: step of the checkpoint on the storage; None begins the run anew.
      meta: of that checkpoint, or of the run that begins.
      say: is told where every host has a later one.
    """
    if config.checkpoints.local_dir is None:
        return None, newest, meta
    meta = meta | {"run_id": run_id(meta)}
    local = local_checkpoints(config.checkpoints.local_dir, meta["run_id"], meta["config_hash"], mesh, say)
    later = None if newest is None else local.agreed(newest)
    if later is None:
        return local, newest, meta
    say(f"going on from the local checkpoint of step {later}; the storage has step {newest}")
    return local, later, local.meta(later) | {"placement": meta["placement"]}


def restored_state(run: Run, step: int, like: TrainState, trained: Trained | None) -> TrainState:
    """The state of a step: from the storage, or from this host where only that has it."""
    folder = run.config.directory / "checkpoints"
    if run.local is None or step in checkpoints.steps(folder):
        return stored_states.restore(folder, step, like, trained=trained)
    state = run.local.restore(step, checkpoints.learned_part(like, trained))
    return checkpoints.with_frozen_part(state, like, trained)
