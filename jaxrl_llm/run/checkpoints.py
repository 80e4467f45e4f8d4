"""Checkpoints: the whole state in one atomic step directory, written by orbax."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxrl_llm.bounds import natural
from jaxrl_llm.config import Config, differences, numeric_tree, placement_tree
from jaxrl_llm.models.model import Trained
from jaxrl_llm.run import frozen as frozen_parts
from jaxrl_llm.run.digests import Digest, digests, text_digest
from jaxrl_llm.run.directories import at_hand, is_step
from jaxrl_llm.run.frozen import Frozen
from jaxrl_llm.run.private_disks import all_write, directories_first, item_handlers
from jaxrl_llm.run.retention import METRIC, preserved


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run."""


class Damaged(CheckpointError):
    """A damaged checkpoint, `step` of `directory`, whose content differs from the digests; `reason` says how."""

    def __init__(self, directory: Path, step: int, reason: str):
        super().__init__(f"checkpoint {step} in {directory} is damaged: {reason}")
        self.directory, self.step, self.reason = directory, step, reason


# Keys of the metadata beside the caller's: digests of the arrays, and of the metadata itself.
_DIGESTS, _OWN = "digests", "digest"


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of a config as canonical JSON, 16 hex digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def require_own_config(config: Config, meta: Mapping[str, Any]) -> str:
    """A note for a run that is resumed with changed placement keys; "" for none.

    Raises:
      CheckpointError: for changed keys that decide numbers, naming every key with both values.
    """
    if meta["config_hash"] != config_hash(numeric_tree(config)):
        found = differences(meta["config"], numeric_tree(config))
        raise CheckpointError(
            f"run {config.directory} was started with another config: {', '.join(found)}{_why(config, found)}; resume "
            f"it with its own values (jaxrl train --resume {config.directory}), or start a new run from its weights "
            f"with init_from={config.directory} and another run_dir"
        )
    moved = differences(meta["placement"], placement_tree(config))
    if not moved:
        return ""
    return (
        f"placement has changed: {', '.join(moved)}; sums are added in another order, so the last digits of numbers "
        "may differ"
    )


def _why(config: Config, changed: Sequence[str]) -> str:
    """The reason where the number of steps is among the changed keys; "" otherwise."""
    if any(one.startswith("training.steps ") for one in changed):
        return (
            f"; training.steps may only change under a constant schedule, since training.schedule "
            f"{config.training.schedule} makes the learning rate of every step depend on it"
        )
    if any(re.match(r"stages\.\d+\.training\.steps ", one) for one in changed):
        return "; the number of steps of an entry of stages may not change"
    return ""


def checkpoint_manager(
    directory: Path,
    *,
    keep: int,
    keep_every_steps: int | None = None,
    keep_best: int = 0,
    best_is: str = "highest",
    apart: bool = False,
) -> ocp.CheckpointManager:
    """A manager that writes in the background and keeps the newest steps, multiples, and the best.

    Args:
      directory: the checkpoints directory.
      keep: number of newest steps to keep.
      keep_every_steps: steps at multiples of this are never deleted; None: none.
      keep_best: number of best steps to keep, among those saved with a metric.
      best_is: "highest" or "lowest" metric.
      apart: each of several processes has this directory on a private disk, for the arrays that it holds.
    """
    return ocp.CheckpointManager(
        Path(directory).resolve(),
        item_handlers=item_handlers() if apart else None,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=preserved(keep, keep_every_steps, keep_best, best_is),
            enable_async_checkpointing=True,
            async_options=directories_first() if apart else None,
            multiprocessing_options=all_write(apart),
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    *,
    trained: Trained | None = None,
    metric: float | None = None,
    frozen: Mapping[str, Frozen] | None = None,
    apart: bool = False,
) -> None:
    """Write state and metadata as one step; a kill at any moment leaves the previous step intact.

    Args:
      manager: of the checkpoints directory.
      step: index of the step.
      state: the state to write.
      meta: metadata as plain data.
      trained: of the model; if given, only the trained part of `state.params` is written.
      metric: value by which the best steps are chosen; None if unknown.
      frozen: networks whose parameters were written once (`frozen.written`); the checkpoint only refers to them.
      apart: as the manager was made.

    Raises:
      CheckpointError: if that step exists already (orbax would silently skip it).
    """
    state = learned_part(state, trained)
    once = dict(frozen or {})
    state = frozen_parts.without(state, once) if once else state
    recorded = digests(state)
    for one in once.values():
        recorded |= one.digests
    # A copy, since it is written in the background while the caller changes it.
    meta = copy.deepcopy(dict(meta)) | {_DIGESTS: recorded}
    meta |= {frozen_parts.KEY: {name: one.name for name, one in once.items()}} if once else {}
    meta |= {_OWN: text_digest(meta)}
    tree = ocp.args.PyTreeSave(state) if apart else ocp.args.StandardSave(state)
    written = ocp.args.Composite(state=tree, meta=ocp.args.JsonSave(meta))
    if not manager.save(step, args=written, metrics=None if metric is None else {METRIC: metric}):
        raise CheckpointError(
            f"checkpoint {step} in {manager.directory} exists already, so it was not written again; resume from it, or "
            "use another run_dir"
        )


def steps(directory: Path) -> list[int]:
    """Steps under a checkpoints directory that were completely written; they may have been damaged since."""
    directory = Path(directory)
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if str(natural(name)) == name)


def latest_step(directory: Path) -> int | None:
    """Newest complete step under a checkpoints directory, None when there is none."""
    return max(steps(directory), default=None)


def require_step(directory: Path, step: int) -> None:
    """Raise CheckpointError, with a list of the existing steps, unless a step exists."""
    if step not in (there := steps(directory)):
        held = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; there are {held}")


def checkpoints_of(path: str | Path) -> tuple[Path, int | None]:
    """(checkpoints directory, step) of a path; the step is None for a run directory.

    Raises:
      CheckpointError: if there is no checkpoint.
    """
    path = at_hand(path)
    if is_step(path):
        require_step(path.parent, int(path.name))
        return path.parent, int(path.name)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if not steps(folder):
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run directory (with checkpoints/ inside) or one checkpoint, "
            "for example runs/demo or runs/demo/checkpoints/270"
        )
    return folder, None


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The metadata of one step.

    Raises:
      Damaged: if it is missing or differs from its digest.
    """
    meta = _whole_meta(directory, step)
    return {name: value for name, value in meta.items() if name not in (_DIGESTS, _OWN, frozen_parts.KEY)}


def read_digests(directory: Path, step: int) -> dict[str, Digest] | None:
    """The recorded digests of all arrays of a step; None for a step written by a version without digests.

    Raises:
      Damaged: as for `read_meta`.
    """
    recorded = _whole_meta(directory, step).get(_DIGESTS)
    return None if recorded is None else {path: Digest(*digest) for path, digest in recorded.items()}


def named_apart(directory: Path, step: int) -> dict[str, Path]:
    """Folders of the parameters of networks that a step only refers to.

    Raises:
      Damaged: as for `read_meta`.
    """
    named = _whole_meta(directory, step).get(frozen_parts.KEY, {})
    return {network: frozen_parts.folder(directory, name) for network, name in named.items()}


def _whole_meta(directory: Path, step: int) -> dict[str, Any]:
    path = Path(directory) / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_bytes())
        if not isinstance(meta, dict):
            raise ValueError
        own = meta.pop(_OWN, None)
        fine = own == text_digest(meta) if own is not None else _DIGESTS not in meta and "stage" in meta
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(directory, step, "its meta is missing") from None
    except (ValueError, RecursionError):
        fine = False
    if not fine:
        raise Damaged(directory, step, "its metadata differs from its digest")
    return meta


def _with_params(state: Any, params: PyTree) -> Any:
    """The state with other parameters of the policy."""
    policy = replace(state.networks["policy"], params=params)
    return replace(state, networks={**state.networks, "policy": policy})


def learned_part(state: Any, trained: Trained | None) -> Any:
    """The state as written: only the trained part of the policy's parameters."""
    return state if trained is None else _with_params(state, trained.split(state.params)[0])


def with_frozen_part(state: Any, like: Any, trained: Trained | None) -> Any:
    """A restored state with the frozen parameters of `like` added."""
    return state if trained is None else _with_params(state, trained.join(state.params, trained.split(like.params)[1]))


def written_networks(parts: Any, state: Any) -> dict[str, Any]:
    """The networks of a state that a checkpoint holds: all except those that are read from a path and never change."""
    networks = parts.step.composition.networks
    fixed = {name for name in parts.paths if name in networks and name not in parts.step.composition.learning}
    return {name: one for name, one in state.networks.items() if name not in fixed}
