"""Machines by name: number, memory and speed of their devices, and their network."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any, Literal

from jaxrl_llm.bounds import natural

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as a program sees it, with peak rates.

    Attributes:
      name: of the type.
      bytes: memory that a program may use; for TPUs the limit of their compiler.
      flops: bfloat16 operations per second.
      bandwidth: bytes per second of that memory.
      link: bytes per second of one link of the fast network in one direction.
      dimensions: dimensions of the torus; 0 if a switch connects all devices of a host.
      wraps: a dimension whose size is a multiple of this is closed to a ring.
      slow: bytes per second of a device's share of the network between slices or hosts, in one direction.
      cores: devices per chip.
      platform: platform of its compiler.
      host_bytes: host memory of a machine with four chips; 0 if unknown.
      kind: jax's device kind.
    """

    name: str
    bytes: float
    flops: float
    bandwidth: float
    link: float
    dimensions: int
    wraps: int
    slow: float
    cores: int = 1
    platform: Literal["tpu", "gpu", "cpu"] = "tpu"
    host_bytes: float = 0
    kind: str = ""


# TPU rates: cloud.google.com/tpu/docs; links: "How to scale your model" (jax-ml.github.io/scaling-book). A chip of
# tpu7x is two devices, which share its links. Hosts: machine types with four chips, as GKE's pages list them.
TPUS = {
    "v4": Chip("v4", 30.75 * GIB, 275e12, 1.228e12, 45e9, 3, 4, 6e9, host_bytes=407e9, kind="TPU v4"),
    "v5e": Chip("v5e", 15.75 * GIB, 197e12, 0.819e12, 45e9, 2, 16, 6e9, host_bytes=192e9, kind="TPU v5 lite"),
    "v5p": Chip("v5p", 95.74 * GIB, 459e12, 2.765e12, 90e9, 3, 4, 6e9, host_bytes=448e9, kind="TPU v5"),
    "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1.64e12, 90e9, 2, 16, 12e9, host_bytes=720e9, kind="TPU v6 lite"),
    "tpu7x": Chip("tpu7x", 94.75 * GIB, 1153e12, 3.69e12, 50e9, 3, 4, 6e9, cores=2, host_bytes=960e9, kind="TPU7x"),
}
# NVIDIA's data sheets, dense bfloat16; between hosts 400 Gb/s a GPU (B200: 800).
GPUS = {
    "H100": Chip("H100", 80e9, 989e12, 3.35e12, 450e9, 0, 0, 50e9, platform="gpu"),
    "H200": Chip("H200", 141e9, 989e12, 4.8e12, 450e9, 0, 0, 50e9, platform="gpu"),
    "B200": Chip("B200", 180e9, 2250e12, 8.0e12, 900e9, 0, 0, 100e9, platform="gpu"),
}
# A virtual device of a CPU: round numbers, so that times compare layouts and promise nothing.
CPU = Chip("cpu", 4 * GIB, 5e10, 1e10, 5e9, 0, 0, 1e9, platform="cpu")

# Shapes that accelerator types such as v5e-64 stand for. v5e and v6e count chips, the others cores, two to a chip.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_KNOWN = (
    "v4:2x2x1, v5e:4x4, v5e-64, v5p:4x4x8, v5p-256 (which counts cores, two to a chip), v6e:8x8, tpu7x:2x2x2, "
    "2*v5e:16x16 (slices), gpu:8xH100, gpu:4x8xB200 (hosts x GPUs; H100, H200, B200), cpu:8"
)


@dataclass(frozen=True)
class Topology:
    """Devices of a machine.

    Attributes:
      name: the given name.
      chip: the kind of device.
      shape: chips along each dimension of one slice; of GPUs those of one host.
      slices: TPU slices, or hosts of GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.slices * self.devices_in_slice

    @property
    def devices_in_slice(self) -> int:
        """Number of devices in one slice or host."""
        return math.prod(self.shape) * self.chip.cores

    @property
    def devices_in_host(self) -> int:
        """Number of devices of one machine: for TPUs at most four chips."""
        return min(self.devices_in_slice, 4 * self.chip.cores) if self.chip.platform == "tpu" else self.devices_in_slice

    @property
    def compiler_name(self) -> str:
        """libtpu's name of the slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def compiler_options(self) -> dict:
        """Further options for libtpu."""
        options: dict = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # two cores as one device, as programs see them
        if math.prod(self.shape) < 4:
            options["chips_per_host_bounds"] = (*self.shape, *[1] * (3 - len(self.shape)))
        return options

    def described_devices(self) -> list[Any]:
        """Its devices with what places them in a mesh: of a TPU slice coordinates, the first dimension fastest."""
        sizes = (*self.shape, *[1] * (3 - len(self.shape))) if self.chip.platform == "tpu" else (*self.shape, 1, 1)
        chips = product(*(range(size) for size in reversed(sizes)))
        places = [(at[::-1], core) for at in chips for core in range(self.chip.cores)]
        return [
            SimpleNamespace(
                id=number + slice_index * len(places),
                platform=self.chip.platform,
                device_kind=self.chip.kind,
                coords=coords,
                core_on_chip=core,
                slice_index=slice_index,
            )
            for slice_index in range(self.slices)
            for number, (coords, core) in enumerate(places)
        ]

    def network(self, count: int, *, crosses: bool = False) -> float:
        """Bytes per second that each of `count` communicating devices can send.

        On a torus a group spans the smallest number of whole dimensions, and sends along all of them in both
        directions; an open line has half of that.

        Args:
          count: devices in the group.
          crosses: whether the group spans slices or hosts.
        """
        chip = self.chip
        if crosses:
            return chip.slow
        if chip.dimensions == 0:
            return chip.link
        total, left = 0.0, count / chip.cores
        for size in sorted(self.shape, reverse=True):
            if left > 1 and size > 1:
                total += chip.link * (2 if size % chip.wraps == 0 and left >= size else 1)
                left /= size
        return total or chip.link * chip.dimensions  # devices of one chip

    def described(self) -> str:
        """A readable line."""
        chips = f"{self.slices} x " if self.slices > 1 else ""
        return f"{chips}{self.chip.name} {'x'.join(map(str, self.shape))}, {self.devices} devices"


def topology(name: str) -> Topology:
    """The machine of a name such as v5e:16x16, v5p-64, 2*v5e:4x4, gpu:8xH100 or cpu:8.

    Raises:
      ValueError: for an unknown name, with examples of known ones.
    """
    text = name.strip()
    slices, base = 1, text
    if found := re.fullmatch(r"(\d+)\*(.+)", text):
        slices, base = int(found[1]), found[2]
    kind, mark, rest = base.partition(":") if ":" in base else base.rpartition("-")
    if kind == "gpu" and mark == ":":
        return _gpus(name, rest, slices)
    if kind == "cpu" and mark == ":" and natural(rest) and slices == 1:
        return Topology(name, CPU, (int(rest),))
    chip = TPUS.get(kind)
    if chip is None or slices < 1:
        raise _unknown(name, kind)
    if mark == "-":
        return Topology(name, chip, _shape_of_type(name, chip, rest), slices)
    sizes = rest.split("x")
    if not all(natural(size) for size in sizes) or len(sizes) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise ValueError(
            f"topology {name!r}: a slice of {chip.name} has {chip.dimensions} dimensions, such as "
            f"{chip.name}:{example}; write as many sizes"
        )
    return Topology(name, chip, tuple(map(int, sizes)), slices)


def _shape_of_type(name: str, chip: Chip, rest: str) -> tuple[int, ...]:
    count = natural(rest) or 0
    if chip.dimensions == 2:
        if count not in _FLAT:
            raise ValueError(
                f"topology {name!r}: {chip.name} comes in {', '.join(map(str, _FLAT))} chips; take one of them, or "
                f"name the shape, such as {chip.name}:4x4"
            )
        return _FLAT[count]
    chips = count // 2
    if count % 2 or chips < 4 or chips & (chips - 1):
        raise ValueError(
            f"topology {name!r}: {chip.name}-N counts cores, two to a chip, and stands for a shape where N is a power "
            f"of two from 8 on; name the shape instead, such as {chip.name}:4x4x4"
        )
    if chips == 4:
        return (2, 2, 1)
    # Powers of two as equal as possible, the largest last.
    power = chips.bit_length() - 1
    return tuple(2 ** ((power + place) // 3) for place in range(3))


def _gpus(name: str, rest: str, slices: int) -> Topology:
    *counts, kind = rest.split("x")
    chip = {each.upper(): chip for each, chip in GPUS.items()}.get(kind.upper())
    if chip is None or slices != 1 or len(counts) not in (1, 2) or not all(natural(c) for c in counts):
        raise _unknown(name, kind)
    hosts, each = (1, *map(int, counts))[-2:]
    if hosts == 1 and each > 8 and each % 8 == 0:
        hosts, each = each // 8, 8
    return Topology(name, chip, (each,), hosts)


def _unknown(name: str, kind: str) -> ValueError:
    near = difflib.get_close_matches(kind, [*TPUS, *GPUS], n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ValueError(f"topology {name!r} is not known{hint}; known are, for example, {_KNOWN}")
