"""Parameters that a run does not change, such as a reference: written once, with references from checkpoints.

    RUN/frozen/DIGEST        the parameters of one network, by the digest of their content
    RUN/checkpoints/20/meta  {"frozen": {"reference": DIGEST}, "digests": {...}, ...}

The digests of their arrays are in the metadata of every checkpoint, so that they are verified like the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxrl_llm.parallel import hosts
from jaxrl_llm.run.digests import Digest, digests, text_digest
from jaxrl_llm.run.private_disks import all_write, tree_handler

FOLDER, KEY = "frozen", "frozen"  # beside the checkpoints directory; in the meta of a checkpoint


class Frozen(NamedTuple):
    """The written parameters of one network.

    Attributes:
      name: name of its folder.
      digests: digests of its arrays by their paths in a state.
    """

    name: str
    digests: Mapping[str, Digest]


def frozen_networks(composition: Any, held: Iterable[str]) -> list[str]:
    """The networks of a state that no step of a stage changes: not trained, and not following another network."""
    known = composition.networks
    return [name for name in held if name in known and name not in composition.learning and not known[name].moves]


def written_once(
    done: dict[tuple[str, str], Frozen],
    directory: Path,
    stage: str,
    state: Any,
    networks: Iterable[str],
    *,
    apart: bool = False,
) -> dict[str, Frozen]:
    """Write these networks of a state at the first call of a stage; later calls return the entry in `done`."""
    found = {}
    for name in sorted(networks):
        if not jax.tree.leaves(state.networks[name].params):
            continue
        if (stage, name) not in done:
            done[stage, name] = written(directory, name, state.networks[name].params, apart=apart)
        found[name] = done[stage, name]
    return found


def written(directory: Path, network: str, params: PyTree, *, apart: bool = False) -> Frozen:
    """Write parameters of a network beside a checkpoints directory, unless they are there. All processes call it.

    Folders without a reference from a checkpoint are written again: at an address the upload may be incomplete.

    Args:
      directory: the checkpoints directory.
      network, params: its name and what is written.
      apart: each process has such a directory on a disk of its own, and writes the arrays that it holds.
    """
    found = digests(_in_state(network, params))
    frozen = Frozen(text_digest(found), found)
    path = folder(directory, frozen.name)
    there = path.is_dir() and path not in unneeded(directory, _steps(directory))
    if not hosts.from_main(int(there)):
        handler = tree_handler() if apart else ocp.PyTreeCheckpointHandler()
        with ocp.Checkpointer(handler, multiprocessing_options=all_write(apart)) as writer:
            writer.save(path, args=ocp.args.PyTreeSave(params), force=True)
    return frozen


def folder(directory: Path, name: str) -> Path:
    """The folder of parameters of this name."""
    return Path(directory).resolve().parent / FOLDER / name


def without(state: Any, networks: Iterable[str]) -> Any:
    """A state without the parameters of some networks."""
    emptied = {name: replace(state.networks[name], params={}) for name in networks}
    return replace(state, networks={**state.networks, **emptied})


def joined(state: Any, params: Mapping[str, PyTree]) -> Any:
    """A state with the parameters of these networks."""
    filled = {name: replace(state.networks[name], params=held) for name, held in params.items()}
    return replace(state, networks={**state.networks, **filled})


def restored(path: Path, like: PyTree) -> PyTree:
    """Restored parameters in the sharding of `like` (arrays or shapes)."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


def shapes(path: Path) -> PyTree:
    """Shapes and dtypes of parameters, as plain dictionaries and lists."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.metadata(path).item_metadata.tree


def arrays(path: Path, wanted: PyTree) -> PyTree:
    """Parameters as NumPy arrays on the host; placeholders are kept."""
    arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=arguments))


def all_arrays(path: Path, apart: Mapping[str, Path], wanted: PyTree) -> PyTree:
    """`arrays` of a written state, including networks in separate folders."""
    apart = {name: place for name, place in apart.items() if wanted["networks"][name]["params"]}
    if not apart:
        return arrays(path, wanted)
    networks = wanted["networks"]
    rest = {name: {**held, "params": {}} if name in apart else held for name, held in networks.items()}
    state = arrays(path, {**wanted, "networks": rest})
    for name, place in apart.items():
        params = networks[name]["params"]
        read = any(leaf is not ocp.PLACEHOLDER for leaf in jax.tree.leaves(params))
        state["networks"][name]["params"] = arrays(place, params) if read else params
    return state


def unneeded(directory: Path, steps: Iterable[int]) -> list[Path]:
    """Folders of parameters without a reference from these steps; empty if the metadata of a step is unreadable."""
    there = Path(directory).resolve().parent / FOLDER
    named: set[str] = set()
    for step in steps:
        try:
            named |= set(
                json.loads((Path(directory) / str(step) / "meta" / "metadata").read_bytes()).get(KEY, {}).values()
            )
        except (OSError, ValueError, AttributeError):
            return []
    return sorted(path for path in there.iterdir() if path.name not in named) if there.is_dir() else []


def _steps(directory: Path) -> list[int]:
    names = [path.name for path in Path(directory).iterdir()] if Path(directory).is_dir() else []
    return [int(name) for name in names if name.isdecimal()]


def _in_state(network: str, params: PyTree) -> PyTree:
    return {"networks": {network: {"params": params}}}
