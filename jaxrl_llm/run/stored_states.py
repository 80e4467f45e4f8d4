"""The state of a checkpoint on the disk: its shapes, its arrays, and its restoration onto the devices of a run.

A restored state is compared with the expected one by structure, shapes and dtypes, and with the written one by digests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxrl_llm.bounds import error_line
from jaxrl_llm.models.model import Trained
from jaxrl_llm.run import frozen as frozen_parts
from jaxrl_llm.run.checkpoints import (
    CheckpointError,
    Damaged,
    learned_part,
    named_apart,
    read_digests,
    require_step,
    with_frozen_part,
)
from jaxrl_llm.run.digests import bits, by_path, changed
from jaxrl_llm.run.failures import passing, without_loose_ends


def restore(directory: Path, step: int, like: Any, *, trained: Trained | None = None) -> Any:
    """The state of one step, on the same devices as `like`.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      like: a state (or a tree of `jax.ShapeDtypeStruct`) of the same structure.
      trained: of the model; if given, the frozen part of `like.params` becomes that of the result, so it has to consist
        of arrays, not shapes.

    Raises:
      CheckpointError: when structure, shapes or dtypes differ; orbax alone would cast dtypes in silence.
      Damaged: when it is not what was written.
    """
    whole, like = like, learned_part(like, trained)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    require_same(stored_shapes(directory, step), abstract, f"{directory}/{step}")
    apart = named_apart(directory, step)
    item = frozen_parts.without(abstract, apart) if apart else abstract
    with _read_whole(directory, step), ocp.CheckpointManager(Path(directory).resolve()) as manager:
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(item)))["state"]
        read = {name: frozen_parts.restored(path, like.networks[name].params) for name, path in apart.items()}
    state = frozen_parts.joined(state, read) if apart else state
    _require_written(directory, step, state)
    return with_frozen_part(state, whole, trained)


@contextlib.contextmanager
def _read_whole(directory: Path, step: int) -> Iterator[None]:
    """Raises Damaged if orbax fails although the arrays were verified: in the metadata beside them."""
    with without_loose_ends():
        try:
            yield
        except Exception as error:
            if passing(error):
                raise
            raise Damaged(directory, step, f"it cannot be restored ({error_line(error)})") from None


def _require_written(directory: Path, step: int, restored: PyTree) -> None:
    """Raises Damaged unless the arrays that this process holds completely equal the written ones."""
    if recorded := read_digests(directory, step):
        here = {path: bits(leaf) for path, leaf in by_path(restored).items()}
        whole = {path: np.asarray(leaf) for path, leaf in here.items() if getattr(leaf, "is_fully_addressable", True)}
        if bad := changed(whole, recorded):
            raise Damaged(directory, step, f"array {bad[0]} is not what was written")


def restore_params(
    directory: Path, step: int, like: PyTree, *, trained: Trained | None = None, network: str = "policy"
) -> PyTree:
    """The parameters of one network alone from a full checkpoint, with any optimiser.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      like: parameters of the same structure, or their shapes.
      trained: of the model; as for `restore`.
      network: the network whose parameters are read.

    Raises:
      CheckpointError: if the checkpoint holds no such network, or if structure, shapes or dtypes differ from `like`.
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
      network: its name.
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
    apart = named_apart(directory, step) if part == "params" else {}
    with _read_whole(directory, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        if network in apart:
            restored = {"networks": {network: {part: frozen_parts.restored(apart[network], like)}}}
        else:
            restored = reader.restore(_state_path(directory, step), args=arguments)
    _require_written(directory, step, restored)
    return restored["networks"][network][part]


def _state_path(directory: Path, step: int) -> Path:
    return Path(directory).resolve() / str(step) / "state"


def stored_shapes(directory: Path, step: int, within: str = "") -> PyTree:
    """Shapes and dtypes of a written state, as plain dictionaries and lists.

    Args:
      directory: the checkpoints directory.
      step: one of its steps.
      within: entries outside of this path may be left out.

    Raises:
      CheckpointError: when there is none.
    """
    path = _state_path(directory, step)
    require_step(directory, step)
    if not path.is_dir():
        raise Damaged(directory, step, "its state is missing")
    tree = frozen_parts.shapes(path)
    for network, folder in named_apart(directory, step).items():
        below = f"networks/{network}/params/"
        if below.startswith(within) or within.startswith(below):
            if not folder.is_dir():
                raise Damaged(
                    directory, step, f"parameters of {network}, which it shares with others, are gone: {folder}"
                )
            tree["networks"][network]["params"] = frozen_parts.shapes(folder)
    return tree


def stored_arrays(directory: Path, step: int, shapes: PyTree) -> PyTree:
    """Arrays of a written state on the host, as NumPy arrays; placeholders in `shapes` (from `stored_shapes`) stay."""
    return frozen_parts.all_arrays(_state_path(directory, step), named_apart(directory, step), shapes)


def require_same(stored: PyTree, wanted: PyTree, where: str) -> None:
    """Compare by path: the stored tree consists of dictionaries and lists, the expected one of dataclasses.

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
