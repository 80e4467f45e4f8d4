"""The buffers of a compiled program and their lifetimes, from the reports that XLA writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20


class Buffer(NamedTuple):
    """One value in the temporary memory of a device.

    Attributes:
      value: name of the instruction that creates it.
      shape: dtype and sizes.
      bytes: as laid out, padding included.
      offset: its address.
      start, end: first and last instruction of its life, in the order of the program.
    """

    value: str
    shape: str
    bytes: int
    offset: int
    start: int
    end: int


class Reports(NamedTuple):
    """Buffers of at least a MiB, and the instructions of a program in order."""

    buffers: list[Buffer]
    order: list[str]


def read_reports(directory: Path) -> Reports | None:
    """The reports of `xla_dump_to` in a directory with one program; None without a schedule."""
    lives = sorted(directory.glob("*live-range.txt"))
    assigned = sorted(directory.glob("*buffer-assignment.txt"))
    if not lives or not assigned:
        return None
    order, ranges = _schedule(lives[-1].read_text())
    buffers, temporary = [], False
    for line in assigned[-1].read_text().splitlines():
        if line.startswith("allocation"):
            # Other colours are faster memories.
            temporary = "preallocated-temp" in line and not re.search(r"color [1-9]", line)
        elif temporary and (found := re.match(r"\s+value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\): (\S+)", line)):
            name, size, offset, shape = found[1], int(found[2]), int(found[3]), found[4]
            life = ranges.get(name) or ranges.get(f"{name}{{}}")
            if size >= MIB and life is not None:
                buffers.append(Buffer(re.sub(r"\{.*", "", name), shape.split("{")[0], size, offset, *life))
    return Reports(buffers, order) if order else None


def _schedule(text: str) -> tuple[list[str], dict[str, tuple[int, int]]]:
    order, ranges = [], {}
    for line in text.splitlines():
        if found := re.match(r"\s+\d+:(\S+)$", line):
            order.append(found[1])
        elif found := re.match(r"\s+(\S+?):(\d+)-(\d+)$", line):
            ranges[found[1]] = (int(found[2]), int(found[3]))
        elif line.strip().startswith("Live ranges at"):
            break
    return order, ranges


def peaks(reports: Reports, phases: Mapping[str, str]) -> dict[str, tuple[int, list[Buffer]]]:
    """For each phase, the peak of temporary memory, and its buffers, the largest first.

    Args:
      reports: of a program.
      phases: phase of an instruction, by name.
    """
    found: dict[str, tuple[int, list[Buffer]]] = {}
    moments = sorted({buffer.start for buffer in reports.buffers} | {0})
    for moment in moments:
        name = reports.order[min(moment, len(reports.order) - 1)]
        phase = phases.get(name, "other")
        live = [buffer for buffer in reports.buffers if buffer.start <= moment <= buffer.end]
        held = _extent(live)
        if held > found.get(phase, (-1, []))[0]:
            found[phase] = held, _distinct(live)
    return found


def _extent(live: list[Buffer]) -> int:
    """Bytes covered by buffers together; overlapping ones count once."""
    total, reached = 0, 0
    for buffer in sorted(live, key=lambda each: each.offset):
        end = buffer.offset + buffer.bytes
        total += max(0, end - max(reached, buffer.offset))
        reached = max(reached, end)
    return total


def _distinct(live: list[Buffer]) -> list[Buffer]:
    places: dict[tuple[int, int], Buffer] = {}
    for buffer in live:
        places.setdefault((buffer.offset, buffer.bytes), buffer)
    return sorted(places.values(), key=lambda each: -each.bytes)


def as_rows(buffers: list[Buffer], origins: Mapping[str, str], count: int = 6) -> list[dict[str, Any]]:
    """The largest buffers as plain data, with their origins in the program."""
    return [
        {"bytes": buffer.bytes, "shape": buffer.shape, "value": buffer.value, "from": origins.get(buffer.value, "")}
        for buffer in buffers[:count]
    ]
