"""Checkpoints: the whole state in one atomic step directory, written by orbax, refused when it does not fit."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
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
    """A checkpoint, `step` of `directory`, that is not what was written; `reason` says what of it."""

    def __init__(self, directory: Path, step: int, reason: str):
        super().__init__(f"checkpoint {step} in {directory} is damaged: {reason}")
        self.directory, self.step, self.reason = directory, step, reason


# What the meta holds beside the caller's: digests of the arrays, and of itself.
_DIGESTS, _OWN = "digests", "digest"


def config_hash(config: Mapping[str, Any]) -> str:
    """Sixteen hex digits over a config as a canonical JSON text."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def require_own_config(config: Config, meta: Mapping[str, Any]) -> str:
    """What to say of a run that goes on in other places, in other pieces; "" for nothing.

    Raises:
      CheckpointError: where it would go on with other numbers; names every key with both values.
    """
    if meta["config_hash"] != config_hash(numeric_tree(config)):
        raise CheckpointError(
            f"run {config.directory} was started with another config: "
            f"{', '.join(differences(meta['config'], numeric_tree(config)))}; resume it with its own values (jaxrl "
            f"train --resume {config.directory}), or start a new run from its weights with "
            f"init_from={config.directory} and another run_dir"
        )
    moved = differences(meta["placement"], placement_tree(config))
    if not moved:
        return ""
    return (
        f"placement has changed: {', '.join(moved)}; sums are added in another order, so the last digits of numbers "
        "may be others than without the change"
    )


def checkpoint_manager(
    directory: Path,
    *,
    keep: int,
    keep_every_steps: int | None = None,
    keep_best: int = 0,
    best_is: str = "highest",
    apart: bool = False,
) -> ocp.CheckpointManager:
    """A manager that writes in the background and keeps the newest steps, and some for ever.

    Args:
      directory: the checkpoints directory.
      keep: how many of the newest are kept.
      keep_every_steps: multiples of this are kept for ever; None for none.
      keep_best: of the steps that were saved with a metric, how many of the best are kept.
      best_is: "highest" or "lowest" metric.
      apart: each of several processes has such a directory on a disk of its own, for the arrays that it holds.
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
    """Write state and meta as one step; a kill at any moment leaves the previous step whole.

    Args:
      manager: of the checkpoints directory.
      step: number of the step.
      state: what is written.
      meta: plain data beside it.
      trained: of the model; where it is given, of `state.params` only what learns is written.
      metric: that the best steps are chosen by; None where it is not known.
      frozen: networks whose parameters were written once (`frozen.written`), and are named alone.
      apart: as the manager was made.

    Raises:
      CheckpointError: when that step exists already (orbax would skip it in silence).
    """
    state = learned_part(state, trained)
    once = dict(frozen or {})
    state = frozen_parts.without(state, once) if once else state
    recorded = digests(state)
    for one in once.values():
        recorded |= one.digests
    # Written in the background, while the caller goes on to change it.
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
    """Steps under a checkpoints directory that were written to their end, whatever became of them since."""
    directory = Path(directory)
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if str(natural(name)) == name)


def latest_step(directory: Path) -> int | None:
    """Newest complete step under a checkpoints directory, None when there is none."""
    return max(steps(directory), default=None)


def require_step(directory: Path, step: int) -> None:
    """Raises CheckpointError unless a step is there, with those that are."""
    if step not in (there := steps(directory)):
        held = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; there are {held}")


def checkpoints_of(path: str | Path) -> tuple[Path, int | None]:
    """(checkpoints directory, step) that a path names; a run directory names no step.

    Raises:
      CheckpointError: when no checkpoint is there.
    """
    path = at_hand(path)
    if is_step(path):
        require_step(path.parent, int(path.name))
        return path.parent, int(path.name)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if not steps(folder):
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run directory (with checkpoints/ inside) or one checkpoint, "
            "for example runs/demo or runs/demo/checkpoints/120"
        )
    return folder, None


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The meta of one step alone.

    Raises:
      Damaged: when it is not there or not what was written.
    """
    meta = _whole_meta(directory, step)
    return {name: value for name, value in meta.items() if name not in (_DIGESTS, _OWN, frozen_parts.KEY)}


def read_digests(directory: Path, step: int) -> dict[str, Digest] | None:
    """What was recorded of every array of a step; None for a step that was written before digests were.

    Raises:
      Damaged: as for `read_meta`.
    """
    recorded = _whole_meta(directory, step).get(_DIGESTS)
    return None if recorded is None else {path: Digest(*digest) for path, digest in recorded.items()}


def named_apart(directory: Path, step: int) -> dict[str, Path]:
    """Where the parameters of networks lie that a step names alone.

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
        raise Damaged(directory, step, "its meta is not what was written")
    return meta


def _with_params(state: Any, params: PyTree) -> Any:
    """The state with other parameters of the policy."""
    policy = replace(state.networks["policy"], params=params)
    return replace(state, networks={**state.networks, "policy": policy})


def learned_part(state: Any, trained: Trained | None) -> Any:
    """The state as it is written: of the policy's parameters only what learns."""
    return state if trained is None else _with_params(state, trained.split(state.params)[0])


def with_frozen_part(state: Any, like: Any, trained: Trained | None) -> Any:
    """A state that was read, with what is frozen of the parameters of `like`."""
    return state if trained is None else _with_params(state, trained.join(state.params, trained.split(like.params)[1]))


def written_networks(parts: Any, state: Any) -> dict[str, Any]:
    """The networks of a state that a checkpoint holds: all but those that are read from a path and never change."""
    networks = parts.step.composition.networks
    fixed = {name for name in parts.paths if name in networks and name not in parts.step.composition.learning}
    return {name: one for name, one in state.networks.items() if name not in fixed}
