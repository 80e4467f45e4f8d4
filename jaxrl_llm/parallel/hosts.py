"""Division of a run among hosts: each builds and scores its own rows, and one host writes records.

The global batch does not depend on the number of hosts: rows are indexed over the whole batch, the sharding determines
the rows on a host's devices, and a host builds only those.
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
    """Set the connections to the other processes for the functions here; None for a single process."""
    global _peers
    _peers = peers


def peers() -> Peers | None:
    """The connections to the other processes, if there are others."""
    return _peers


def is_main() -> bool:
    """Whether this process is the one that writes metrics, samples and tables. Checkpoints are written by all."""
    return jax.process_index() == 0


def agreed_stop(wanted: bool) -> bool:
    """Whether all processes stop here; each calls it once per step. See `Peers.agreed_stop`."""
    return wanted if _peers is None else _peers.agreed_stop(wanted)


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """Ascending indices of the rows, out of `count`, on devices of this host.

    Raises:
      ValueError: if the sharding does not divide the rows.
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
    """Global arrays of `count` rows; each host builds its own rows.

    Args:
      build: indices of rows -> a tree of arrays with these rows along the first axis. Row i must not depend on the
        other requested rows.
      count: rows of the global arrays.
      sharding: of the first axis; the other axes are not split.

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
    """Global arrays from arrays of rows that exist on every host; each host passes the rows of its devices.

    Args:
      tree: arrays with the same number of rows, equal on all hosts.
      mesh: the devices; None returns the tree unchanged.
      rules: the sharding rules. Mesh axes that do not divide the rows hold all of them.
    """
    leaves = jax.tree.leaves(tree)
    if mesh is None or not leaves:
        return tree
    count = leaves[0].shape[0]
    return global_rows(
        lambda rows: jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree), count, row_sharding(count, mesh, rules)
    )


def row_sharding(count: int, mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The sharding of `count` rows, as far as the mesh divides them."""
    return NamedSharding(mesh, partition_spec(("rows",), (count,), mesh, rules))


def by_rows(tree: PyTree, groups: int, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """Global arrays resharded so that every host holds whole rows and whole groups.

    Args:
      tree: arrays with one entry per row, in any sharding.
      groups: number of equal blocks of consecutive rows that are kept together; for unequal blocks, the number of rows.
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

    A replicated row belongs to the host of its first replica.
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
    """All `count` rows on every host, from the rows of each host, such as host rewards after scoring.

    Every row must be given by exactly one host; then the result is bit-identical for any number of hosts.
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
    """Wait until all hosts have called this function."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def from_main(number: int | None) -> int | None:
    """The value (a natural number or None) of process 0. All hosts must call it."""
    if jax.process_count() == 1:
        return number
    said = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number)))
    return None if said < 0 else said


def said_by_all(text: str) -> list[str]:
    """The texts of all hosts, in order of their numbers. All hosts must call it."""
    if jax.process_count() == 1:
        return [text]
    said = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(said)))
    padded = np.frombuffer(said.ljust(max(int(sizes.max()), 1)), np.uint8)
    all_said = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode(errors="replace") for row, size in zip(all_said, sizes, strict=True)]


def first_failure(text: str | None) -> str | None:
    """The error message of the first host that has one; None without errors. All hosts must call it."""
    if jax.process_count() == 1:
        return text
    said = enumerate(said_by_all((text or "")[:4000]))
    return next((f"process {process}: {what}" for process, what in said if what), None)
