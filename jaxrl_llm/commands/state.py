"""`jaxrl ckpt` and `jaxrl replay`: inspect, verify and clean up the files of a run."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from jaxrl_llm.bounds import counted
from jaxrl_llm.commands.arguments import require_positive
from jaxrl_llm.commands.tables import show
from jaxrl_llm.reporting.mirror import changed_in_place
from jaxrl_llm.run import checkpoints, integrity, tidying
from jaxrl_llm.run.replay import replayed


def show_replay(options: argparse.Namespace) -> None:
    """`jaxrl replay`: the groups of a failed batch, each with its non-finite numbers."""
    described, entries = replayed(options.file)
    if options.json:
        print(json.dumps(described | {"groups": entries}, indent=2))
        return
    step = described["policy of checkpoint"]
    policy = "the initial policy of the run" if step is None else f"the policy of checkpoint {step}"
    show(options, entries, f"step {described['step']} ({described['stage']}), group by group with {policy}")


def show_checkpoints(options: argparse.Namespace) -> int:
    """`jaxrl ckpt list` and `jaxrl ckpt verify`; status 1 if a checkpoint is damaged."""
    folder, only = checkpoints.checkpoints_of(options.path)
    rows, damaged = [], False
    for step in checkpoints.steps(folder) if only is None else [only]:
        found = integrity.verified(folder, step) if options.verify else None
        try:
            meta = checkpoints.read_meta(folder, step)
        except checkpoints.Damaged as error:
            meta, found = {}, found or integrity.Verified(step, error.reason)
        damaged |= found is not None and found.damage is not None
        files = [path for path in (folder / str(step)).rglob("*") if path.is_file()]
        row = {
            "step": step,
            "stage": meta.get("stage", "?"),
            "MB": round(sum(path.stat().st_size for path in files) / 1e6, 2),
            "metric": meta.get("metric", ""),
        }
        if found is not None:
            row |= {"state": "damaged: " + found.damage if found.damage else "good" if found.recorded else "readable"}
        rows.append(row)
    show(options, rows, f"checkpoints of {folder.parent}")
    return int(damaged)


def prune_checkpoints(options: argparse.Namespace) -> None:
    """`jaxrl ckpt prune`: delete all checkpoints except the newest, the newest good one, and multiples of
    --keep-every."""
    require_positive(options, "keep", "keep_every")
    with changed_in_place(options.path, partial(print, file=sys.stderr)) as path:
        folder, _ = checkpoints.checkpoints_of(path)
        good = integrity.newest_good(folder)
        assert good is not None  # there are some
        gone = tidying.prune(folder, keep=options.keep, keep_every_steps=options.keep_every, within=[good])
    show(options, [{"deleted": step} for step in gone], f"{counted(len(gone), 'checkpoint')} deleted from {folder}")


def convert_checkpoint(options: argparse.Namespace) -> None:
    """`jaxrl ckpt convert`: rewrite a checkpoint with digests and unchanged numbers, whole or one network of it."""
    folder, step = integrity.latest_checkpoint(options.path)
    written = tidying.converted(folder, step, Path(options.out), network=options.only)
    show(options, [{"from": f"{folder}/{step}", "to": str(written)}], "converted")
