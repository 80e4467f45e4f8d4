"""The automatic mesh: chosen from the number of devices, the size of the model, and divisibility."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

GIB = 2**30
# If the backend does not report the memory of a device.
ASSUMED_BYTES = 16 * GIB
# Shares of a device's memory for the whole state, and for the weights of decoding.
STATE_SHARE, WEIGHTS_SHARE = 0.3, 0.4


class Demand(NamedTuple):
    """The memory demand of a run, and limits on its division.

    Attributes:
      state_bytes: parameters, gradients, optimiser state and copies, all together.
      weight_bytes: parameters in the dtype of decoding.
      heads: greatest common divisor of all sizes that `tensor` must divide.
      experts: number of experts per block; 1 without a mixture.
      rows: sequences per backward pass.
    """

    state_bytes: int
    weight_bytes: int
    heads: int = 1
    experts: int = 1
    rows: int = 1


def automatic_sizes(
    devices: list[Any], demand: Demand, *, device_bytes: int | None = None
) -> tuple[dict[str, int], str]:
    """(sizes of the mesh axes, reason).

    Data parallel if the whole state fits beside the activations; otherwise sharded over all devices (`fsdp`), with the
    smallest `tensor` for which the gathered weights of decoding fit, `expert` for a mixture, and `sequence` for devices
    without their own row. Every slice of a multi-slice machine is a replica.
    """
    memory = device_bytes or memory_of(devices[0])
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    count = len(devices) // slices
    of_memory = f"of {memory / GIB:.3g} GiB"
    sizes = {"slice": slices} if slices > 1 else {}
    if demand.state_bytes <= STATE_SHARE * memory:
        split = math.gcd(count, max(1, demand.rows // slices))
        sizes |= {"data": split} | ({"sequence": count // split} if split < count else {})
        return sizes, f"the state, {demand.state_bytes / GIB:.2g} GiB, fits in every device {of_memory}"
    reasons = [f"the state, {demand.state_bytes / GIB:.3g} GiB, does not fit in one device {of_memory}"]
    tensor = next(
        (
            n
            for n in range(1, count + 1)
            if count % n == 0 and demand.heads % n == 0 and demand.weight_bytes / n <= WEIGHTS_SHARE * memory
        ),
        math.gcd(count, demand.heads),
    )
    if tensor > 1:
        reasons.append(f"decoding reads {demand.weight_bytes / GIB:.3g} GiB of weights, a {tensor}th on each device")
    rest = count // tensor
    expert = math.gcd(rest, demand.experts) if demand.experts > 1 else 1
    if expert > 1:
        reasons.append(f"{demand.experts} experts over {expert} devices")
    sharded = math.gcd(rest // expert, max(1, demand.rows // (slices * expert)))
    sequence = rest // expert // sharded
    if sequence > 1:
        reasons.append(f"{demand.rows} rows leave {sequence} devices to each row")
    sizes |= {"fsdp": sharded, "expert": expert, "sequence": sequence, "tensor": tensor}
    return {axis: size for axis, size in sizes.items() if size > 1} or {"data": 1}, "; ".join(reasons)


def memory_of(device: Any) -> int:
    """Bytes of a device that a program may use, as reported by its backend, or an assumption."""
    try:
        stats = device.memory_stats()
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        stats = None
    return int((stats or {}).get("bytes_limit", ASSUMED_BYTES))
