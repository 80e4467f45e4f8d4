"""Checkpoints: the whole state in one atomic step directory, written by orbax, refused when it does not fit."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxrl_llm.config import Config, differences, numeric_tree, placement_tree
from jaxrl_llm.models.model import Trained


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run."""


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


def checkpoint_manager(directory: Path, *, keep: int) -> ocp.CheckpointManager:
    """A manager that writes in the background and keeps the newest `keep` steps."""
    return ocp.CheckpointManager(
        Path(directory).resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
    )


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, meta: Mapping[str, Any], *, trained: Trained | None = None
) -> None:
    """Write state and meta as one step; a kill at any moment leaves the previous step whole.

    Args:
      manager: of the checkpoints directory.
      step: number of the step.
      state: what is written.
      meta: plain data beside it.
      trained: of the model; where it is given, of `state.params` only what learns is written.

    Raises:
      CheckpointError: when that step exists already (orbax would skip it in silence).
    """
    if trained is not None:
        state = _with_params(state, trained.split(state.params)[0])
    # Written in the background, while the caller goes on to change it.
    meta = copy.deepcopy(dict(meta))
    if not manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    ):
        raise CheckpointError(
            f"checkpoint {step} in {manager.directory} exists already, so it was not written again; resume from it, or "
            "use another run_dir"
        )


def latest_step(directory: Path) -> int | None:
    """Newest complete step under a checkpoints directory, None when there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        return None
    steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
    return max(steps, default=None)


def latest_checkpoint(path: str | Path) -> tuple[Path, int]:
    """(checkpoints directory, step) that a run directory or a single checkpoint directory stands for.

    Raises:
      CheckpointError: when there is none.
    """
    path = Path(path)
    if path.name.isdigit() and (path / "state").is_dir():
        return path.parent, int(path.name)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    step = latest_step(folder)
    if step is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run directory (with checkpoints/ inside) or one checkpoint, "
            "for example runs/demo or runs/demo/checkpoints/120"
        )
    return folder, step


def branch_checkpoint(path: str | Path, step: int | None) -> Path:
    """The checkpoint that `init_from` names: of a run its newest, or that of a step.

    Raises:
      CheckpointError: when there is none.
    """
    folder, newest = latest_checkpoint(path)
    chosen = folder / str(newest if step is None else step)
    if not chosen.is_dir():
        there = ", ".join(sorted((p.name for p in folder.iterdir() if p.name.isdigit()), key=int))
        raise CheckpointError(f"init_from names step {step} of {path}, which has checkpoints of the steps {there}")
    return chosen


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The meta of one step alone."""
    with ocp.CheckpointManager(Path(directory).resolve()) as manager:
        return dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])


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
    """
    frozen = None
    if trained is not None:
        part, frozen = trained.split(like.params)
        like = _with_params(like, part)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    require_same(_stored(directory, step), abstract, f"{directory}/{step}")
    with ocp.CheckpointManager(Path(directory).resolve()) as manager:
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    return state if trained is None else _with_params(state, trained.join(state.params, frozen))


def _with_params(state: Any, params: PyTree) -> Any:
    """The state with other parameters of the policy."""
    policy = replace(state.networks["policy"], params=params)
    return replace(state, networks={**state.networks, "policy": policy})


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
    held = _stored(directory, step)["networks"]
    if network not in held:
        raise CheckpointError(f"checkpoint {directory}/{step} holds no network {network!r}; it has {', '.join(held)}")
    require_same({"networks": {network: {part: held[network][part]}}}, abstract, f"{directory}/{step}")
    arguments = ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(_state_path(directory, step), args=arguments)["networks"][network][part]


def _state_path(directory: Path, step: int) -> Path:
    return Path(directory).resolve() / str(step) / "state"


def _stored(directory: Path, step: int) -> PyTree:
    """Shapes and dtypes of a written state, as plain dictionaries and lists."""
    path = _state_path(directory, step)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {directory} has no step {step}; there is {latest_step(directory)}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.metadata(path).item_metadata.tree


def require_same(stored: PyTree, wanted: PyTree, where: str) -> None:
    """Compare by path: the stored tree is made of dictionaries and lists, the wanted one of dataclasses.

    Raises:
      CheckpointError: for the first leaf that differs.
    """

    def by_path(tree: PyTree) -> dict[str, Any]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {"/".join(_key(part) for part in path): leaf for path, leaf in leaves}

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


def _key(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
