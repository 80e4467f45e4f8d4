"""Devices as a mesh. One device is a mesh of one, and no other module knows how many there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxrl_llm.parallel.rules import AXES, RULES, Rules, constrain_rows, layout

# Names of the fields of section mesh where they differ from the axes'.
_FIELDS = {"slice": "slices"}


def make_mesh(devices: int | Sequence[Any] | None = None, sizes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh with the axes slice, data, fsdp, expert, sequence and tensor.

    Args:
      devices: how many of the devices that there are, from the first, or the devices themselves; None takes all.
      sizes: of the axes, 1 where an axis is not named; None puts all devices on `data`.

    Raises:
      ValueError: when there are fewer devices than asked for, the sizes do not multiply to their number, or a TPU
        slice cannot be divided in this way.
    """
    chosen = _devices(devices)
    sizes = {"data": len(chosen)} if sizes is None else dict(sizes)
    if unknown := sorted(sizes.keys() - set(AXES)):
        raise ValueError(f"mesh axis {unknown[0]!r} does not exist; the axes are {', '.join(AXES)}")
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh.{_FIELDS.get(axis, axis)} is {size}; it must be at least 1")
    if (problem := axis_product_error(sizes, len(chosen))) is not None:
        raise ValueError(problem)
    # Neighbours on a torus share the axes that communicate most.
    neighbours = isinstance(devices, int) or devices is None or getattr(chosen[0], "platform", "") == "tpu"
    placed = placed_devices(chosen, sizes, neighbours=neighbours)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def placed_devices(devices: Sequence[Any], sizes: Mapping[str, int], *, neighbours: bool = True) -> np.ndarray:
    """The devices along the axes of a mesh of these sizes.

    Args:
      devices: as many as the sizes multiply to; of a TPU they have `device_kind`, `coords` and `core_on_chip`.
      sizes: of the axes, 1 where an axis is not named.
      neighbours: devices that are linked lie along one axis; else they keep their order, within a slice.

    Raises:
      ValueError: where devices of a TPU are no box, or no division of the box has these sizes.
    """
    from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh

    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if neighbours and slices not in (1, shape[0]):
        raise ValueError(f"mesh.slices is {shape[0]}, but the devices lie on {slices} slices; set it to {slices}")
    try:
        # A dimension of the torus may belong to several axes: what is asked for is then slower, instead of refused.
        if slices > 1 and shape[0] > 1:
            within, across = (1, *shape[1:]), (shape[0], *[1] * (len(shape) - 1))
            return create_hybrid_device_mesh(within, across, devices=devices, allow_split_physical_axes=True)
        if neighbours:
            return create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    except (NotImplementedError, AssertionError, ValueError) as error:
        given = " x ".join(f"mesh.{_FIELDS.get(axis, axis)} {size}" for axis, size in sizes.items() if size > 1)
        raise ValueError(
            f"{given or 'one device'} cannot be placed on these {len(devices)} devices of a {devices[0].device_kind}; "
            "take sizes that divide the dimensions of the slice, mesh.devices that form a box, or mesh: auto"
        ) from error
    return np.asarray(devices).reshape(shape)


def axis_product_error(sizes: Mapping[str, int], count: int) -> str | None:
    """What is wrong with sizes that do not multiply to the number of devices; None where they do."""
    product = math.prod(sizes.values())
    if product == count:
        return None
    given = " x ".join(f"mesh.{_FIELDS.get(axis, axis)} {size}" for axis, size in sizes.items())
    return f"{given} is {product}, but there are {count} devices; {_way_out(sizes, count)}"


def _devices(devices: int | Sequence[Any] | None) -> list[Any]:
    if devices is not None and not isinstance(devices, int):
        return list(devices)
    there = jax.devices()
    count = len(there) if devices is None else devices
    if not 1 <= count <= len(there):
        raise ValueError(f"mesh.devices is {count}, but this process sees {len(there)}; choose 1 to {len(there)}")
    return there[:count]


def _way_out(sizes: Mapping[str, int], count: int) -> str:
    """What would make the product right, where changing one number is enough."""
    product = math.prod(sizes.values())
    if count % product == 0:
        axis = "fsdp" if sizes.get("fsdp", 1) > 1 else "data"
        return (
            f"set mesh.{axis} to {sizes.get(axis, 1) * count // product}, or mesh.devices to {product}, or leave all "
            "sizes out (mesh: auto)"
        )
    fewer = f"set mesh.devices to {product}, or " if product < count else ""
    return f"{fewer}choose sizes whose product is {count}, or leave them out (mesh: auto)"


def described(mesh: Mesh | None) -> str:
    """The axes that have more than one device, such as "fsdp 4 x tensor 2"."""
    sizes = {} if mesh is None else mesh.shape
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def row_constraint(mesh: Mesh | None, rules: Rules = RULES, name: str = "rows") -> Callable[[PyTree], PyTree]:
    """A function that spreads the first axis of every array over the devices that rows belong to; identity without a
    mesh."""
    if mesh is None:
        return lambda rows: rows

    def constrain(rows: PyTree) -> PyTree:
        with layout(mesh, rules):
            return constrain_rows(rows, name=name)

    return constrain
