"""Checkpoints: the whole state in one atomic step directory, written by orbax, refused when it does not fit."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxrl_llm.bounds import natural
from jaxrl_llm.config import Config, differences, numeric_tree, placement_tree
from jaxrl_llm.models.model import Trained
from jaxrl_llm.run import frozen as frozen_parts
from jaxrl_llm.run.digests import Digest, bits, by_path, changed, digests, text_digest
from jaxrl_llm.run.directories import at_hand, is_step
from jaxrl_llm.run.failures import in_short, passing, without_loose_ends
from jaxrl_llm.run.frozen import Frozen
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
) -> ocp.CheckpointManager:
    """A manager that writes in the background and keeps the newest steps, and some for ever.

    Args:
      directory: the checkpoints directory.
      keep: how many of the newest are kept.
      keep_every_steps: multiples of this are kept for ever; None for none.
      keep_best: of the steps that were saved with a metric, how many of the best are kept.
      best_is: "highest" or "lowest" metric.
    """
    return ocp.CheckpointManager(
        Path(directory).resolve(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=preserved(keep, keep_every_steps, keep_best, best_is), enable_async_checkpointing=True
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

    Raises:
      CheckpointError: when that step exists already (orbax would skip it in silence).
    """
    state = learned_part(state, trained)
    apart = dict(frozen or {})
    state = frozen_parts.without(state, apart) if apart else state
    recorded = digests(state)
    for one in apart.values():
        recorded |= one.digests
    # Written in the background, while the caller goes on to change it.
    meta = copy.deepcopy(dict(meta)) | {_DIGESTS: recorded}
    meta |= {frozen_parts.KEY: {name: one.name for name, one in apart.items()}} if apart else {}
    meta |= {_OWN: text_digest(meta)}
    written = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
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


def restore(directory: Path, step: int, like: Any, *, trained: Trained | None = None) -> Any:
    """State of one step, placed as `like` is.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      like: a state (or a tree of `jax.ShapeDtypeStruct`) of the same structure.
      trained: of the model; where it is given, what is frozen of `like.params` becomes that of the result, and so has
        to be the arrays themselves.

    Raises:
      CheckpointError: when structure, shapes or dtypes differ; orbax alone would cast dtypes in silence.
      Damaged: when it is not what was written.
    """
    whole, like = like, learned_part(like, trained)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    require_same(stored_shapes(directory, step), abstract, f"{directory}/{step}")
    apart = _apart(directory, step)
    item = frozen_parts.without(abstract, apart) if apart else abstract
    with _read_whole(directory, step), ocp.CheckpointManager(Path(directory).resolve()) as manager:
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(item)))["state"]
        read = {name: frozen_parts.restored(path, like.networks[name].params) for name, path in apart.items()}
    state = frozen_parts.joined(state, read) if apart else state
    _require_written(directory, step, state)
    return with_frozen_part(state, whole, trained)


@contextlib.contextmanager
def _read_whole(directory: Path, step: int) -> Iterator[None]:
    """Raises Damaged where orbax fails at what was verified: in what it notes beside the arrays."""
    with without_loose_ends():
        try:
            yield
        except Exception as error:
            if passing(error):
                raise
            raise Damaged(directory, step, f"it cannot be restored ({in_short(error)})") from None


def _require_written(directory: Path, step: int, restored: PyTree) -> None:
    """Raises Damaged unless the arrays that this process has whole are what was written."""
    if recorded := read_digests(directory, step):
        here = {path: bits(leaf) for path, leaf in by_path(restored).items()}
        whole = {path: np.asarray(leaf) for path, leaf in here.items() if getattr(leaf, "is_fully_addressable", True)}
        if bad := changed(whole, recorded):
            raise Damaged(directory, step, f"array {bad[0]} is not what was written")


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


def restore_params(
    directory: Path, step: int, like: PyTree, *, trained: Trained | None = None, network: str = "policy"
) -> PyTree:
    """The parameters of one network alone from a full checkpoint, whatever its optimiser was.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      like: parameters of the same structure, or their shapes.
      trained: of the model; as for `restore`.
      network: whose parameters.

    Raises:
      CheckpointError: when it holds no such network, or when structure, shapes or dtypes differ from `like`.
    """
    frozen = None
    if trained is not None:
        like, frozen = trained.split(like)
    params = restore_part(directory, step, like, network=network)
    return params if trained is None else trained.join(params, frozen)


def restore_part(directory: Path, step: int, like: PyTree, *, network: str = "policy", part: str = "params") -> PyTree:
    """The `params` or the `optimizer_state` of one network, as they were written.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      like: arrays of the same structure, or their shapes.
      network: whose.
      part: which of the two.

    Raises:
      CheckpointError: as for `restore_params`.
    """
    abstract = {"networks": {network: {part: jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}}}
    held = stored_shapes(directory, step, f"networks/{network}/{part}/")["networks"]
    if network not in held:
        raise CheckpointError(f"checkpoint {directory}/{step} holds no network {network!r}; it has {', '.join(held)}")
    require_same({"networks": {network: {part: held[network][part]}}}, abstract, f"{directory}/{step}")
    arguments = ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )
    apart = _apart(directory, step) if part == "params" else {}
    with _read_whole(directory, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        if network in apart:
            restored = {"networks": {network: {part: frozen_parts.restored(apart[network], like)}}}
        else:
            restored = reader.restore(_state_path(directory, step), args=arguments)
    _require_written(directory, step, restored)
    return restored["networks"][network][part]


def _state_path(directory: Path, step: int) -> Path:
    return Path(directory).resolve() / str(step) / "state"


def _apart(directory: Path, step: int) -> dict[str, Path]:
    """Where the parameters of networks lie that a step names alone."""
    named = _whole_meta(directory, step).get(frozen_parts.KEY, {})
    return {network: frozen_parts.folder(directory, name) for network, name in named.items()}


def stored_shapes(directory: Path, step: int, within: str = "") -> PyTree:
    """Shapes and dtypes of a written state, as plain dictionaries and lists.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      within: what is outside of this path may be left out.

    Raises:
      CheckpointError: when there is none.
    """
    path = _state_path(directory, step)
    require_step(directory, step)
    if not path.is_dir():
        raise Damaged(directory, step, "its state is missing")
    tree = frozen_parts.shapes(path)
    for network, folder in _apart(directory, step).items():
        below = f"networks/{network}/params/"
        if below.startswith(within) or within.startswith(below):
            if not folder.is_dir():
                raise Damaged(
                    directory, step, f"parameters of {network}, which it shares with others, are gone: {folder}"
                )
            tree["networks"][network]["params"] = frozen_parts.shapes(folder)
    return tree


def stored_arrays(directory: Path, step: int, shapes: PyTree) -> PyTree:
    """Arrays of a written state on the host, as NumPy's; of `shapes`, from `stored_shapes`, placeholders are left."""
    return frozen_parts.all_arrays(_state_path(directory, step), _apart(directory, step), shapes)


def require_same(stored: PyTree, wanted: PyTree, where: str) -> None:
    """Compare by path: the stored tree is made of dictionaries and lists, the wanted one of dataclasses.

    Raises:
      CheckpointError: for the first leaf that differs.
    """
    here, there = by_path(wanted), by_path(stored)
    for path in sorted(here.keys() ^ there.keys()):
        side = "lacks" if path in here else "has a surplus"
        raise CheckpointError(f"checkpoint {where} {side} {path!r}; it belongs to a run with another config")
    for path, leaf in here.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue  # written as its raw bits
        shape, dtype = tuple(there[path].shape), there[path].dtype
        if shape != tuple(leaf.shape) or str(dtype) != str(leaf.dtype):
            raise CheckpointError(
                f"checkpoint {where} holds {path!r} as {dtype}{list(shape)}, but this config makes it "
                f"{leaf.dtype}{list(leaf.shape)}; use the config that the checkpoint was written with"
            )
