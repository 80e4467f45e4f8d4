"""What a host does of a run on many: rows of its own, scores of its own rows, and one host that writes.

The global batch is the same whatever the number of hosts: rows are numbered over the whole batch, a sharding says
which rows a host's devices hold, and a host builds those and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxrl_llm.parallel.peers import Peers
from jaxrl_llm.parallel.rules import RULES, Rules, partition_spec

_peers: Peers | None = None


def join(peers: Peers | None) -> None:
    """Make the connections to the other processes known to the functions here; None for one process alone."""
    global _peers
    _peers = peers


def peers() -> Peers | None:
    """The connections to the other processes, if there are others."""
    return _peers


def is_main() -> bool:
    """Whether this process is the one that writes metrics, samples and tables. Checkpoints are written by all."""
    return jax.process_index() == 0


def agreed_stop(wanted: bool) -> bool:
    """Whether all processes stop here; each calls it once a step. `Peers.agreed_stop` says more."""
    return wanted if _peers is None else _peers.agreed_stop(wanted)


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """Numbers of the rows, of `count`, that devices of this host hold, ascending.

    Raises:
      ValueError: when the sharding does not divide the rows.
    """
    try:
        indices = sharding.addressable_devices_indices_map((count,))
    except ValueError as error:
        raise ValueError(
            f"{count} rows cannot be spread over the mesh {dict(sharding.mesh.shape)} by {sharding.spec}: choose a "
            f"number that the axes divide ({error})"
        ) from None
    return np.unique(np.concatenate([np.arange(count)[index] for index in indices.values() if index is not None]))


def global_rows(build: Callable[[np.ndarray], PyTree], count: int, sharding: NamedSharding) -> PyTree:
    """Global arrays of `count` rows, of which each host builds its own.

    Args:
      build: takes the numbers of rows and returns a tree of arrays with those rows along the first axis. Row i must be
        the same whichever rows are asked for with it.
      count: rows of the global arrays.
      sharding: of the first axis; the other axes are whole on every device.

    Returns:
      A tree of global arrays.
    """
    rows = local_rows(NamedSharding(sharding.mesh, P(*sharding.spec[:1])), count)
    position = {int(row): at for at, row in enumerate(rows)}

    def spread(leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.shape[:1] != rows.shape:
            raise ValueError(f"{len(rows)} rows were asked for, but an array of shape {leaf.shape} was built")

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return leaf[[position[row] for row in range(count)[index[0]]]]

        whole = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
        return jax.make_array_from_callback((count, *leaf.shape[1:]), whole, part)

    return jax.tree.map(spread, build(rows))


def placed_rows(tree: PyTree, mesh: Mesh | None, rules: Rules = RULES) -> PyTree:
    """Global arrays from arrays of rows that every host has: each hands over those that its devices hold.

    Args:
      tree: arrays with the same number of rows, equal on all hosts.
      mesh: the devices; None leaves the tree as it is.
      rules: the table that says which devices rows belong to. Those that do not divide the rows hold all of them.
    """
    leaves = jax.tree.leaves(tree)
    if mesh is None or not leaves:
        return tree
    count = leaves[0].shape[0]
    return global_rows(
        lambda rows: jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree), count, row_sharding(count, mesh, rules)
    )


def row_sharding(count: int, mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Where the table puts `count` rows, as far as the mesh divides them."""
    return NamedSharding(mesh, partition_spec(("rows",), (count,), mesh, rules))


def by_rows(tree: PyTree, groups: int, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """Global arrays moved to where every host holds whole rows, and whole groups of them.

    Args:
      tree: arrays with one entry a row, wherever a program has left them.
      groups: equal blocks of neighbouring rows that are not torn apart; where they are not equal, rows are.
      mesh: the devices.
      rules: the table.
    """
    count = jax.tree.leaves(tree)[0].shape[0]
    return _moved(row_sharding(count if count % groups else groups, mesh, rules))(tree)


@cache
def _moved(sharding: NamedSharding) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def own_rows(tree: PyTree) -> tuple[np.ndarray, PyTree]:
    """(numbers, rows) of global arrays that are this host's to score: every row is exactly one host's.

    Where several devices hold a row, the host of its first replica owns it.
    """
    leaves = jax.tree.leaves(tree)
    shards = [shard for shard in leaves[0].addressable_shards if shard.replica_id == 0]
    rows = [np.arange(leaves[0].shape[0])[shard.index[0]] for shard in shards]
    order = np.argsort(np.concatenate([np.zeros(0, int), *rows]), kind="stable")

    def own(leaf: jax.Array) -> np.ndarray:
        parts = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        empty = np.zeros((0, *leaf.shape[1:]), leaf.dtype)
        return np.concatenate([empty, *parts])[order]

    return np.concatenate([np.zeros(0, int), *rows])[order], jax.tree.map(own, tree)


def gathered_rows(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """All `count` rows on every host, from the rows that each host has: what host rewards are after scoring.

    Every row must be given by exactly one host; the result is then the same, bit for bit, for any number of hosts.
    """
    values = np.asarray(values)
    whole = np.zeros((count, *values.shape[1:]), values.dtype)
    whole[rows] = values
    if jax.process_count() == 1:
        return whole
    owner = np.zeros(count, np.int32)
    owner[rows] = 1
    parts, owners = multihost_utils.process_allgather((whole, owner))
    if not (owners.sum(0) == 1).all():
        raise ValueError(f"rows {np.flatnonzero(owners.sum(0) != 1).tolist()} were given by no host, or by several")
    return parts[owners.argmax(0), np.arange(count)]


def host_copy(tree: PyTree) -> PyTree:
    """Global arrays as NumPy arrays, whole, on every host. All hosts must call it."""

    def here(leaf: Any) -> bool:
        return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated

    def whole(leaf: Any) -> Any:
        return leaf if here(leaf) else _moved(NamedSharding(leaf.sharding.mesh, P()))(leaf)

    return jax.device_get(jax.tree.map(whole, tree))


def meet(where: str) -> None:
    """Wait until all hosts are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def from_main(number: int | None) -> int | None:
    """What this whole number, at least 0, or None is on the host that writes. All hosts must call it."""
    if jax.process_count() == 1:
        return number
    said = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number)))
    return None if said < 0 else said


def said_by_all(text: str) -> list[str]:
    """What every host says, in the order of their numbers. All hosts must call it."""
    if jax.process_count() == 1:
        return [text]
    said = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(said)))
    padded = np.frombuffer(said.ljust(max(int(sizes.max()), 1)), np.uint8)
    all_said = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode(errors="replace") for row, size in zip(all_said, sizes, strict=True)]


def first_failure(text: str | None) -> str | None:
    """What went wrong on the first host where something did; None where nothing did. All hosts must call it."""
    if jax.process_count() == 1:
        return text
    said = enumerate(said_by_all((text or "")[:4000]))
    return next((f"process {process}: {what}" for process, what in said if what), None)
