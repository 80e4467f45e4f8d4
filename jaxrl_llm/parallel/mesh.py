"""Devices as a mesh. One device is a mesh of one, and no other module knows how many there are."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

DATA_AXIS = "data"


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh with one axis, `data`, over the first `devices` devices (None: all of them).

    Raises:
      ValueError: when there are fewer devices than asked for.
    """
    there = jax.devices()
    devices = len(there) if devices is None else devices
    if not 1 <= devices <= len(there):
        raise ValueError(f"mesh.devices is {devices}, but this process sees {len(there)}; choose 1 to {len(there)}")
    return jax.make_mesh((devices,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=there[:devices])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def constrain_replicated(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside a program: pin arrays to every device, so that a step returns its state as it received it."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), tree)


def row_constraint(mesh: Mesh | None) -> Callable[[PyTree], PyTree]:
    """A function that spreads the first axis of every array over the data axis; identity without a mesh."""
    if mesh is None:
        return lambda rows: rows

    def constrain(rows: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: (
                jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(DATA_AXIS)))
                if x.shape[0] % mesh.shape[DATA_AXIS] == 0
                else x
            ),
            rows,
        )

    return constrain
