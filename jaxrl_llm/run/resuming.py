"""Where a run goes on from: its newest good checkpoint, with records that agree with it, or with a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrl_llm.config import Config
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting.run_directory import last_step
from jaxrl_llm.run import checkpoints, integrity


def step_to_go_on_from(config: Config, *, exact: bool, first_saved: bool, say: Callable[[str], Any]) -> int | None:
    """The step whose checkpoint a run goes on from; None begins it anew. All processes must call it.

    Args:
      config: of the run.
      exact: refuse to go on from an earlier checkpoint than the newest.
      first_saved: the run saves its first state before its first step.
      say: tells people what was found.

    Raises:
      CheckpointError: when no checkpoint is good, or there is none although there are records of steps.
    """
    folder = config.directory / "checkpoints"
    newest = integrity.newest_good(folder, exact=exact, say=say)
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


def clear_the_way(config: Config, newest: int | None, say: Callable[[str], Any]) -> None:
    """Move checkpoints that the run cannot go on from out of `checkpoints`. All processes must call it."""
    if hosts.is_main():
        for moved in integrity.set_aside(config.directory / "checkpoints", -1 if newest is None else newest):
            say(f"damaged checkpoint moved to {moved}")
    hosts.meet("damaged checkpoints are out of the way")
