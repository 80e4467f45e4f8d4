"""Parser of the text of a compiled program: computations, instructions, and iterations of loops."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """One array; `space` is 0 in the large memory of a device, above it in a faster or in the host's."""

    dtype: str
    sizes: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Size in bytes, without the padding of tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits[0]) if digits else 32
        return math.prod(self.sizes) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @cached_property
    def origin(self) -> str:
        """Path of name scopes of its origin."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation named by an attribute."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


class Program:
    """The computations of a compiled module, by name, each a list of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        # The attributes of a kernel may run over several lines.
        for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():
            if line.startswith((" ", "\t")) and current is not None:
                if (one := _instruction(line)) is not None:
                    current.append(one)
            elif (header := _HEADER.match(line)) and "->" in line:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif line == "}":
                current = None
        found = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        # An asynchronous collective is written into every fusion that it overlaps with, under one channel.
        self.started = {
            channel(one)
            for instructions in self.computations.values()
            for one in instructions
            if one.op in COLLECTIVES and one.name in fed(instructions, "AsyncCollectiveStart")
        } - {None}

    @cached_property
    def names(self) -> dict[str, dict[str, Instruction]]:
        """Instructions by computation and name."""
        return {name: {one.name: one for one in body} for name, body in self.computations.items()}

    def trips(self, loop: Instruction) -> int | None:
        """Iterations of a loop; None if they depend on data. Loops count up from 0."""
        if found := re.search(r'known_trip_count":?\{"n":"(\d+)"', loop.attributes):
            return int(found[1])
        condition, body = loop.called("condition") or "", loop.called("body") or ""
        compared = next((one for one in self.computations.get(condition, ()) if one.root), None)
        if compared is None or compared.op != "compare" or "direction=LT" not in compared.attributes:
            return None
        counter, limit = (self.names[condition].get(name) for name in compared.operands)
        if counter is None or limit is None or counter.op != "get-tuple-element" or (end := _constant(limit)) is None:
            return None
        place = _index(counter)
        after = next((one for one in self.computations.get(body, ()) if one.root), None)
        if after is None or after.op != "tuple" or place is None or place >= len(after.operands):
            return None
        step = self._increase(body, after.operands[place], place)
        return -(-end // step) if step else None

    def _increase(self, computation: str, name: str, place: int | None, given: Sequence[int | None] = ()) -> int | None:
        """Increment of a counter in one iteration of a loop."""
        one = self.names[computation].get(name)
        if one is None:
            return None
        if one.op == "get-tuple-element" and _index(one) == place:
            return 0
        if one.op == "constant":
            return _constant(one)
        if (number := parameter(one)) is not None and int(number[1]) < len(given):
            return given[int(number[1])]
        inputs = [self._increase(computation, each, place, given) for each in one.operands]
        if one.op == "fusion" and (inside := one.called("calls")):
            root = next((each for each in self.computations[inside] if each.root), None)
            return None if root is None else self._increase(inside, root.name, None, inputs)
        if one.op not in ("add", "copy", "bitcast") or None in inputs:
            return None
        return sum(each for each in inputs if each is not None)


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if named is None:
        return None
    rest = line[named.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opened = rest.find("(")
    if opened < 0:
        return None
    closed = _closing(rest, opened)
    # The value of a constant is in the place of operands.
    inner, op = rest[opened + 1 : closed], rest[:opened]
    after = rest[closed + 1 :] if op not in ("constant", "parameter") else rest[: closed + 1]
    return Instruction(
        named[2], op, shapes_in(kind), tuple(_OPERAND.findall(inner)) if op != "constant" else (), after, bool(named[1])
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    return len(text) - 1


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays in a type."""
    found = []
    for dtype, sizes, arrangement in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", arrangement)
        dimensions = tuple(int(re.sub(r"\D", "", size)) for size in sizes.split(",") if size)
        found.append(Shape(dtype, dimensions, int(space[1]) if space else 0))
    return tuple(found)


def branches(one: Instruction) -> list[str]:
    """The branch computations of a conditional."""
    if found := re.search(r"branch_computations=\{([^}]*)\}", one.attributes):
        return _OPERAND.findall(found[1]) or [name.strip() for name in found[1].split(",")]
    return [name for key in ("true_computation", "false_computation") if (name := one.called(key))]


def _constant(one: Instruction) -> int | None:
    found = re.match(r"constant\((-?\d+)\)", one.attributes) if one.op == "constant" else None
    return int(found[1]) if found else None


def _index(one: Instruction) -> int | None:
    found = re.search(r"index=(\d+)", one.attributes) if one.op == "get-tuple-element" else None
    return int(found[1]) if found else None


def channel(one: Instruction) -> str | None:
    """The channel shared by the start and the end of a collective."""
    found = re.search(r"channel_id=(\d+)", one.attributes)
    return found[1] if found else None


def fed(body: Sequence[Instruction], target: str) -> set[str]:
    """The operands of custom calls of this target."""
    return {name for one in body if f'"{target}"' in one.attributes for name in one.operands}


def parameter(one: Instruction) -> re.Match | None:
    """The number of a parameter, as group 1; None for anything else."""
    return re.search(r"parameter\((\d+)\)", one.attributes) if one.op == "parameter" else None
