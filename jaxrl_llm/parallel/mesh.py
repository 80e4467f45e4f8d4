"""Devices as a mesh. A single device is a mesh of size one; no other module depends on the number of devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxrl_llm.bounds import there_are
from jaxrl_llm.parallel.rules import AXES, RULES, Rules, constrain_rows, layout

# Names of the fields of section mesh where they differ from the axes'.
_FIELDS = {"slice": "slices"}


def make_mesh(devices: int | Sequence[Any] | None = None, sizes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh with the axes slice, data, fsdp, expert, sequence and tensor.

    Args:
      devices: number of devices to use, from the first, or the devices themselves; None uses all.
      sizes: of the axes, 1 where an axis is not named; None puts all devices on `data`.

    Raises:
      ValueError: for fewer devices than requested, sizes whose product differs from their number, or an impossible
        division of a TPU slice.
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
    # The axes with the most communication are mapped to neighbours on the torus.
    neighbours = isinstance(devices, int) or devices is None or getattr(chosen[0], "platform", "") == "tpu"
    placed = placed_devices(chosen, sizes, neighbours=neighbours)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def placed_devices(devices: Sequence[Any], sizes: Mapping[str, int], *, neighbours: bool = True) -> np.ndarray:
    """The devices along the axes of a mesh of these sizes.

    Args:
      devices: as many as the product of the sizes; TPU devices have `device_kind`, `coords` and `core_on_chip`.
      sizes: of the axes, 1 where an axis is not named.
      neighbours: place linked devices along one axis; otherwise keep their order, within a slice.

    Raises:
      ValueError: if the devices of a TPU do not form a box, or the box cannot be divided into these sizes.
    """
    from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh

    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if neighbours and slices not in (1, shape[0]):
        raise ValueError(f"mesh.slices is {shape[0]}, but the devices lie on {slices} slices; set it to {slices}")
    try:
        # A dimension of the torus may be split among several axes: this is slower, but not refused.
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
    """Error message for sizes whose product differs from the number of devices; None if they agree."""
    product = math.prod(sizes.values())
    if product == count:
        return None
    given = " x ".join(f"mesh.{_FIELDS.get(axis, axis)} {size}" for axis, size in sizes.items())
    return f"{given} is {product}, but {there_are(count, 'device')}; {_way_out(sizes, count)}"


def _devices(devices: int | Sequence[Any] | None) -> list[Any]:
    if devices is not None and not isinstance(devices, int):
        return list(devices)
    there = jax.devices()
    count = len(there) if devices is None else devices
    if not 1 <= count <= len(there):
        raise ValueError(f"mesh.devices is {count}, but this process sees {len(there)}; choose 1 to {len(there)}")
    return there[:count]


def _way_out(sizes: Mapping[str, int], count: int) -> str:
    """The remedy, if changing one number gives the right product."""
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
    """A function that shards the first axis of every array over the devices of rows; identity without a mesh."""
    if mesh is None:
        return lambda rows: rows

    def constrain(rows: PyTree) -> PyTree:
        with layout(mesh, rules):
            return constrain_rows(rows, name=name)

    return constrain
