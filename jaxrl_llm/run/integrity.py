"""Verification of checkpoints: the newest good one is found, and damaged ones are reported.

Before a checkpoint is restored, all its arrays are read and compared with the digests in its metadata.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxrl_llm.bounds import error_line
from jaxrl_llm.parallel import hosts
from jaxrl_llm.run import checkpoints, stored_states
from jaxrl_llm.run.checkpoints import CheckpointError, Damaged
from jaxrl_llm.run.digests import Digest, by_path, changed
from jaxrl_llm.run.failures import passing, without_loose_ends

_BYTES = 1 << 30  # bytes of arrays that are read at once
ASIDE = "damaged"  # folder next to `checkpoints` for checkpoints that are damaged or newer than the restored one


class Verified(NamedTuple):
    """The result of verifying a step of a checkpoints directory.

    Attributes:
      step: the step.
      damage: description of the damage; None for a good checkpoint.
      recorded: whether the checkpoint has digests; without them, only its readability was tested.
      arrays, size, seconds: number of arrays, size in bytes, and duration of the verification.
    """

    step: int
    damage: str | None
    recorded: bool = False
    arrays: int = 0
    size: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.damage:
            return f"checkpoint {self.step} is damaged: {self.damage}"
        how = "verified" if self.recorded else "readable, but it has no digests to verify it"
        return f"checkpoint {self.step} is {how} ({self.arrays} arrays, {self.size / 1e6:.3g} MB, {self.seconds:.2g} s)"


def verified(directory: Path, step: int, *, within: str = "", share: tuple[int, int] = (0, 1)) -> Verified:
    """Read a step and compare it with its recorded digests.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      within: only arrays whose path starts with this prefix are read.
      share: (index of this reader, number of readers): each reads its share of the arrays.

    Raises:
      CheckpointError: if there is no such step.
      OSError: if the storage cannot be reached; the checkpoint may still be good.
    """
    started = time.monotonic()
    try:
        with without_loose_ends():
            recorded = checkpoints.read_digests(directory, step)
            damage, wanted = _compared(directory, step, recorded, within, share)
    except Damaged as error:
        return Verified(step, error.reason)
    except CheckpointError:
        raise
    except Exception as error:
        if passing(error):
            raise
        return Verified(step, f"it cannot be read ({error_line(error)})")
    if damage is not None:
        return Verified(step, damage)
    size = sum(_size(digest) for digest in wanted.values())
    return Verified(step, None, recorded is not None, len(wanted), size, time.monotonic() - started)


def _compared(
    directory: Path, step: int, recorded: Mapping[str, Digest] | None, within: str, share: tuple[int, int]
) -> tuple[str | None, dict[str, Digest]]:
    """(description of the damage or None, digests of the arrays that were compared), as for `verified`."""
    tree = stored_states.stored_shapes(directory, step, within)
    there = {path: leaf for path, leaf in by_path(tree).items() if path.startswith(within)}
    wanted = recorded or {path: Digest(str(leaf.dtype), leaf.shape, {}) for path, leaf in there.items()}
    wanted = {path: digest for path, digest in wanted.items() if path.startswith(within)}
    if missing := sorted(wanted.keys() ^ there.keys()):
        return f"it {'lacks' if missing[0] in wanted else 'has a surplus'} array {missing[0]}", wanted
    for read in _arrays(directory, step, tree, dict(sorted(wanted.items())[share[0] :: share[1]])):
        if recorded and (bad := changed(read, wanted)):
            return f"array {bad[0]} differs from what was written", wanted
    return None, wanted


def _arrays(directory: Path, step: int, tree: PyTree, wanted: Mapping[str, Digest]) -> Iterator[dict[str, np.ndarray]]:
    """The wanted arrays as NumPy arrays, in groups of at most `_BYTES`."""
    held, size = [], 0
    groups = [held]
    for path, digest in wanted.items():
        if held and size + _size(digest) > _BYTES:
            held, size = [], 0
            groups.append(held)
        held.append(path)
        size += _size(digest)
    leaves, structure = jax.tree.flatten(tree)
    order = list(by_path(tree))
    for group in filter(None, groups):
        chosen = set(group)
        item = [leaf if path in chosen else ocp.PLACEHOLDER for path, leaf in zip(order, leaves, strict=True)]
        read = stored_states.stored_arrays(directory, step, structure.unflatten(item))
        yield {path: array for path, array in by_path(read).items() if path in chosen}


def _size(digest: Digest) -> int:
    return int(np.prod(digest.shape, dtype=np.int64)) * jax.numpy.dtype(digest.dtype).itemsize


Say = Callable[[str], Any]


def newest_good(
    directory: Path, *, exact: bool = False, within: str = "", say: Say | None = None, apart: bool = False
) -> int | None:
    """The newest good step; None if there are no steps. All processes must call this function.

    Args:
      directory: the checkpoints directory.
      exact: whether only the newest step is accepted.
      within: as for `verified`.
      say: function that is called with a message about every verified step; None: messages about damaged ones are
        printed on standard error.
      apart: whether each process has the directory on a private disk, so that each reads all of it.

    Raises:
      CheckpointError: if no step is good, or with `exact` if the newest one is not.
    """
    bad: list[str] = []
    share = (0, 1) if apart else (jax.process_index(), jax.process_count())
    for step in _agreed(checkpoints.steps(directory)):
        found = verified(directory, step, within=within, share=share)
        found = found._replace(damage=hosts.first_failure(found.damage))
        if found.damage is None:
            (say or (lambda text: None))(str(found))
            return step
        bad.append(str(found))
        if exact:
            raise CheckpointError(f"{directory}: {bad[0]}; leave --exact out to resume from the newest good one")
        (say or _warn)(f"{found}; trying the one before it")
    if bad:
        raise CheckpointError(
            f"{directory} holds no good checkpoint: {'; '.join(bad[:5])}; restore one from a copy, or start a new run "
            "with another run_dir"
        )
    return None


def latest_checkpoint(path: str | Path, *, within: str = "") -> tuple[Path, int]:
    """(checkpoints directory, step) of a run directory or a single checkpoint directory.

    Args:
      path: for a run, its newest good checkpoint is returned, and a message reports newer damaged ones.
      within: as for `verified`.

    Raises:
      CheckpointError: if there is no good checkpoint, or the given one is damaged.
    """
    folder, step = checkpoints.checkpoints_of(path)
    if step is None:
        step = newest_good(folder, within=within)
        assert step is not None  # there are some
    elif damage := verified(folder, step, within=within).damage:
        good = f"{folder.parent}" if folder.name == "checkpoints" else str(folder)
        raise CheckpointError(f"checkpoint {path} is damaged: {damage}; use {good} for the newest good one")
    return folder, step


def branch_checkpoint(path: str | Path, step: int | None) -> Path:
    """The checkpoint for `init_from`: the newest one of a run, or that of the given step.

    Raises:
      CheckpointError: if there is no such checkpoint.
    """
    folder, newest = latest_checkpoint(path)
    chosen = folder / str(newest if step is None else step)
    if not chosen.is_dir():
        there = ", ".join(map(str, checkpoints.steps(folder)))
        raise CheckpointError(f"init_from names step {step} of {path}, which has checkpoints of the steps {there}")
    return chosen


def _agreed(steps: list[int]) -> list[int]:
    """The steps that process 0 has found, in descending order, on all processes."""
    count = hosts.from_main(len(steps)) or 0
    newest = sorted(steps, reverse=True) + [0] * count
    return [hosts.from_main(newest[place]) or 0 for place in range(count)]


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def set_aside(directory: Path, after: int) -> list[Path]:
    """Move the steps after a given one into the folder `damaged`, and return their new paths.

    A run that resumes from an earlier step writes these steps again.
    """
    moved = []
    for step in sorted(checkpoints.steps(directory)):
        if step > after:
            target = Path(directory).parent / ASIDE / str(step)
            number = 1
            while target.exists():
                target, number = target.with_name(f"{step}.{number}"), number + 1
            target.parent.mkdir(exist_ok=True)
            (Path(directory) / str(step)).rename(target)
            moved.append(target)
    return moved
