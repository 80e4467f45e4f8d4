"""What a host does of a run on many: rows of its own, scores of its own rows, and one host that writes.

The global batch is the same whatever the number of hosts: rows are numbered over the whole batch, a sharding says
which rows a host's devices hold, and a host builds those and no others.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxrl_llm.parallel.peers import Peers

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

    def copied(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(copied, tree)
