"""What a compiled program does, read from its text: operations, memory traffic and communication of one device.

XLA's own cost model counts the body of a loop once. Here it counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# What moves nothing: other names for what is there, constants, and the calls whose insides are counted.
_FREE = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
        *("async-done", "async-update", "copy-done", "slice-done", "partition-id", "replica-id", "after-all"),
        *("opt-barrier", "domain", "add-dependency"),
    ]
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
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
        """In memory, without what tiles are padded with."""
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
        """Path of names under which the program made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Cost:
    """What one device does.

    Attributes:
      flops: operations of matrix products and attention kernels.
      bytes: read from and written to the large memory.
      collectives: bytes that the device sends, by kind of collective.
      seconds_on_network: for all of them, one after the other.
      kernels: names of custom kernels and how often they run.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds_on_network: float = 0.0
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))


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
            _channel(one)
            for instructions in self.computations.values()
            for one in instructions
            if one.op in COLLECTIVES and one.name in _fed(instructions, "AsyncCollectiveStart")
        } - {None}

    @cached_property
    def names(self) -> dict[str, dict[str, Instruction]]:
        """Instructions by computation and name."""
        return {name: {one.name: one for one in body} for name, body in self.computations.items()}

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs; None where that depends on data. Loops count up from 0."""
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
        """By how much a counter grows in one turn of a loop."""
        one = self.names[computation].get(name)
        if one is None:
            return None
        if one.op == "get-tuple-element" and _index(one) == place:
            return 0
        if one.op == "constant":
            return _constant(one)
        if (number := _parameter(one)) is not None and int(number[1]) < len(given):
            return given[int(number[1])]
        inputs = [self._increase(computation, each, place, given) for each in one.operands]
        if one.op == "fusion" and (inside := one.called("calls")):
            root = next((each for each in self.computations[inside] if each.root), None)
            return None if root is None else self._increase(inside, root.name, None, inputs)
        if one.op not in ("add", "copy", "bitcast") or None in inputs:
            return None
        return sum(each for each in inputs if each is not None)


def costs(
    program: Program,
    phases: Sequence[str] = (),
    *,
    steps: Mapping[str, Sequence[int]] | None = None,
    network: Callable[[Sequence[Sequence[int]]], float] | None = None,
) -> tuple[dict[str, Cost], dict[str, str]]:
    """(what each phase of a program costs one device, phase of each instruction by name).

    Args:
      program: parsed.
      phases: names of scopes; an instruction belongs to the first of them in the path of its origin, or to the phase of
        its caller. All else is "other".
      steps: how often the loops of a phase run whose end depends on data, in order; the last number is that of all
        further ones. 1 where a phase is not named.
      network: groups of devices -> bytes a second that each can send.
    """
    result: dict[str, Cost] = defaultdict(Cost)
    belongs: dict[str, str] = {}
    left = {name: list(counts) for name, counts in (steps or {}).items()}

    def depends_on_data(phase: str) -> int:
        counts = left.get(phase, [1])
        return counts.pop(0) if len(counts) > 1 else counts[0]

    def named(one: Instruction) -> str | None:
        path = one.origin.split("/")
        return next((name for name in phases if name in path), None)

    def all_inside(computation: str) -> set[str]:
        """Phases of everything that a loop runs."""
        found = set()
        for one in program.computations.get(computation, ()):
            if (name := named(one)) is not None:
                found.add(name)
            elif one.op == "while":
                found |= all_inside(one.called("body") or "")
        return found

    def walk(computation: str, factor: float, inherited: str) -> None:
        for one in program.computations.get(computation, ()):
            phase = named(one) or inherited
            if one.op == "while" and phase == "other" and len(inside := all_inside(one.called("body") or "")) == 1:
                phase = inside.pop()  # a loop over pieces, around a phase
            belongs[one.name] = phase
            if one.op == "while":
                trips = program.trips(one)
                factor_inside = factor * (depends_on_data(phase) if trips is None else trips)
                walk(one.called("body") or "", factor_inside, phase)
            elif one.op == "conditional":
                branches = _branches(one)
                for branch in branches:
                    walk(branch, factor / len(branches), phase)
            elif one.op == "call":
                walk(one.called("to_apply") or "", factor, phase)
            else:
                _add(result[phase], program, computation, one, factor, network)

    walk(program.entry, 1.0, "other")
    return dict(result), belongs


def _add(total: Cost, program: Program, computation: str, one: Instruction, factor: float, network) -> None:
    """What one instruction costs, everything that is fused into it included."""
    for each, names, body in _with_fused(program, computation, one):
        total.flops += factor * _flops(each, names)
        kind = each.op.removesuffix("-start")
        if kind in COLLECTIVES and (_channel(each) not in program.started or _starts(each, body)):
            sent, groups = _sent(each, program.devices)
            total.collectives[kind] += factor * sent
            if network is not None and sent:
                total.seconds_on_network += factor * sent / network(groups)
        if 'custom_call_target="tpu_custom_call"' in each.attributes:
            total.kernels[_kernel(each)] += factor
    if one.op not in _FREE:
        total.bytes += factor * _traffic(program, program.names[computation], one)


def _with_fused(
    program: Program, computation: str, one: Instruction
) -> Iterator[tuple[Instruction, Mapping, Sequence]]:
    """An instruction and those fused into it, each with the instructions beside it by name, and in order."""
    yield one, program.names[computation], program.computations[computation]
    inside = one.called("calls") or ""
    for each in program.computations.get(inside, ()):
        yield from _with_fused(program, inside, each)


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
    # The value of a constant stands where operands do.
    inner, op = rest[opened + 1 : closed], rest[:opened]
    after = rest[closed + 1 :] if op not in ("constant", "parameter") else rest[: closed + 1]
    return Instruction(
        named[2], op, _shapes(kind), tuple(_OPERAND.findall(inner)) if op != "constant" else (), after, bool(named[1])
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


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, sizes, arrangement in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", arrangement)
        dimensions = tuple(int(re.sub(r"\D", "", size)) for size in sizes.split(",") if size)
        found.append(Shape(dtype, dimensions, int(space[1]) if space else 0))
    return tuple(found)


def _branches(one: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", one.attributes):
        return _OPERAND.findall(found[1]) or [name.strip() for name in found[1].split(",")]
    return [name for key in ("true_computation", "false_computation") if (name := one.called(key))]


def _constant(one: Instruction) -> int | None:
    found = re.match(r"constant\((-?\d+)\)", one.attributes) if one.op == "constant" else None
    return int(found[1]) if found else None


def _index(one: Instruction) -> int | None:
    found = re.search(r"index=(\d+)", one.attributes) if one.op == "get-tuple-element" else None
    return int(found[1]) if found else None


def _channel(one: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", one.attributes)
    return found[1] if found else None


def _fed(body: Sequence[Instruction], target: str) -> set[str]:
    """What custom calls of this target read."""
    return {name for one in body if f'"{target}"' in one.attributes for name in one.operands}


def _starts(one: Instruction, body: Sequence[Instruction]) -> bool:
    return one.name in _fed(body, "AsyncCollectiveStart")


def _kernel(one: Instruction) -> str:
    names = [name for name in one.origin.split("/") if name != "pallas_call"]
    return names[-1] if names else one.name


def _groups(one: Instruction, devices: int) -> list[list[int]]:
    """Which devices exchange data among themselves."""
    if one.op.startswith("collective-permute"):
        return [list(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", one.attributes)]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes):
        shape, over, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        assert over is not None
        numbers = np.arange(math.prod(over)).reshape(over)
        return (numbers.transpose(order) if order else numbers).reshape(shape or [-1]).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", one.attributes):
        return _along_axes(*found.groups())
    if found := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", one.attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", found[1])]
    return [list(range(devices))]


def _along_axes(mesh: str, along: str) -> list[list[int]]:
    """Groups of devices that differ along some axes of a mesh; 'a':(2)4 is the 4 places of `a` after the first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts: list[tuple[str, int]] = list(sizes.items())
    chosen = set()
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        if not size:
            chosen.add(name)
            continue
        place = next(number for number, part in enumerate(parts) if part[0] == name)
        rest = sizes[name] // (int(before) * int(size))
        parts[place : place + 1] = [(f"{name}<", int(before)), (f"{name}=", int(size)), (f"{name}>", rest)]
        chosen.add(f"{name}=")
    numbers = np.arange(math.prod(size for _, size in parts)).reshape([size for _, size in parts])
    within = [place for place, (name, _) in enumerate(parts) if name in chosen]
    outside = [place for place in range(len(parts)) if place not in within]
    count = math.prod(parts[place][1] for place in within)
    return numbers.transpose([*outside, *within]).reshape(-1, count).tolist()


def _sent(one: Instruction, devices: int) -> tuple[float, list[list[int]]]:
    """Bytes that a device sends in a ring, and the groups."""
    groups = _groups(one, devices)
    kind, count = one.op.removesuffix("-start"), max(map(len, groups), default=1)
    started = one.op.endswith("-start")
    arrays = [shape for shape in one.shapes if shape.dtype not in ("token",)]
    if started and kind in ("all-gather", "collective-permute"):
        # (what is sent, what is received, ...)
        arrays = arrays[1:2] if kind == "collective-permute" or len(arrays) <= 3 else arrays[len(arrays) // 2 :]
    size = sum(shape.bytes for shape in arrays)
    share = (count - 1) / count
    sent = {
        "all-gather": size * share,
        "reduce-scatter": size * (count - 1),
        "all-reduce": 2 * size * share,
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]
    return sent, groups


def _flops(one: Instruction, scope: Mapping[str, Instruction]) -> float:
    if one.op == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        left = scope.get(one.operands[0])
        if left is None or not left.shapes:
            return 0.0
        contracted = [int(n) for n in found[1].split(",") if n] if found else []
        inner = math.prod(left.shapes[0].sizes[n] for n in contracted)
        return 2.0 * math.prod(one.shapes[0].sizes) * inner
    if one.op == "convolution":
        return _convolution(one, scope)
    if "tpu_custom_call" in one.attributes:
        return _attention(one)
    if one.op == "custom-call" and ("matmul" in one.attributes or "gemm" in one.attributes):
        left, right = (scope.get(name) for name in one.operands[:2])
        if left is not None and right is not None and left.shapes and right.shapes:
            sizes = [math.prod(shape.sizes) for shape in (left.shapes[0], right.shapes[0], one.shapes[0])]
            return 2.0 * math.sqrt(math.prod(sizes))
    if one.op == "ragged-dot":
        left = scope.get(one.operands[0])
        inner = left.shapes[0].sizes[-1] if left is not None and left.shapes else 0
        return 2.0 * math.prod(one.shapes[0].sizes) * inner
    return 0.0


def _convolution(one: Instruction, scope: Mapping[str, Instruction]) -> float:
    """2 * results * (inputs of each): a TPU writes matrix products so, with batch dimensions as spatial ones."""
    kernel = scope.get(one.operands[1])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if kernel is None or not kernel.shapes or labels is None:
        return 0.0
    of_input, of_kernel, of_output = labels.groups()
    sizes, out = kernel.shapes[0].sizes, one.shapes[0].sizes
    features = sizes[of_kernel.index("i")]
    products = 2.0 * features * out[of_output.index("b")] * out[of_output.index("f")]
    operand = scope.get(one.operands[0])
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", one.attributes) or [""])[0]))
    for place in range(sum(label.isdigit() for label in of_output)):
        digit = str(place)
        options = {key: value.split("x") for key, value in window.items() if key != "window"}
        given = lambda key, default, place=place, options=options: (  # noqa: E731
            options[key][place] if place < len(options.get(key, ())) else default
        )
        size = int(given("size", "1"))
        low = int(given("pad", "0_0").split("_")[0])
        length = operand.shapes[0].sizes[of_input.index(digit)] if operand is not None and operand.shapes else 1
        products *= _pairs(
            out[of_output.index(digit)],
            size,
            length,
            int(given("stride", "1")),
            low,
            int(given("lhs_dilate", "1")),
            int(given("rhs_dilate", "1")),
        )
    return products


def _pairs(out: int, size: int, length: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """How many pairs of an output and a place in the window meet an element of the input."""
    at = np.arange(out)[:, None] * stride - low + np.arange(size)[None, :] * spread
    return int(((at >= 0) & (at % dilate == 0) & (at // dilate < length)).sum())


def _attention(one: Instruction) -> float:
    """Of a splash attention kernel: half of its products, as attention is causal."""
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", one.origin)
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", one.attributes)
    if kind is None or operands is None:
        return 0.0
    arrays = [shape.sizes for shape in _shapes(operands[1]) if shape.dtype in ("bf16", "f32", "f16")]
    if len(arrays) < 2 or len(arrays[0]) < 3:
        return 0.0
    queries, keys = arrays[0], arrays[1]
    products = {"fwd": 2, "dq": 3, "dkv": 4}[kind[1]]
    return products * 2.0 * math.prod(queries) * keys[-2] / 2


def _traffic(program: Program, names: Mapping[str, Instruction], one: Instruction) -> float:
    """Bytes read and written, of what lies in the large memory; a slice of an array counts as the slice."""
    if one.op in ("copy-start", "async-start", "slice-start"):
        moved = [shape for shape in one.shapes if shape.sizes]
        smallest = min((shape.bytes for shape in moved), default=0.0)
        return smallest * sum(1 for shape in moved[:2] if shape.space == 0)
    if one.op in ("dynamic-slice", "slice", "gather"):
        return 2 * _size(one.shapes)
    if one.op == "dynamic-update-slice":
        update = names.get(one.operands[1])
        return 2 * _size(update.shapes) if update is not None else 0.0
    inside = one.called("calls") or ""
    if one.op != "fusion" or inside not in program.computations:
        read = sum(_size(names[name].shapes) for name in one.operands if name in names)
        return read + _size(one.shapes)
    total = 0.0
    for number, name in enumerate(one.operands):
        held = names[name].shapes if name in names else ()
        if (size := _size(held)) and not any(shape.space for shape in held):
            total += min(size, _read(program, inside, number))
    roots = [each for each in program.computations[inside] if each.root]
    parts = roots[0].operands if roots and roots[0].op == "tuple" else [each.name for each in roots]
    for name, shape in zip(parts, one.shapes, strict=False):
        total += 0.0 if shape.space else _written(program, inside, name)
    return total


def _parameter(one: Instruction) -> re.Match | None:
    return re.search(r"parameter\((\d+)\)", one.attributes) if one.op == "parameter" else None


def _read(program: Program, computation: str, number: int) -> float:
    """Bytes that a fused computation reads of a parameter; infinity for all of it."""
    body = program.computations[computation]
    users: dict[str, list[Instruction]] = defaultdict(list)
    for each in body:
        for name in each.operands:
            users[name].append(each)

    def by(name: str) -> float:
        return sum(of(user, name) for user in users[name])

    def of(user: Instruction, name: str) -> float:
        first = user.operands[0] == name
        if user.op in ("dynamic-slice", "slice", "gather") and first:
            return sum(shape.bytes for shape in user.shapes)
        if user.op == "dynamic-update-slice" and first:
            return 0.0
        if user.op in ("bitcast", "reshape", "copy", "transpose", "convert"):
            return by(user.name) or math.inf
        if user.op == "fusion" and (inner := user.called("calls")) in program.computations and inner is not None:
            return sum(_read(program, inner, place) for place, each in enumerate(user.operands) if each == name)
        return math.inf

    given = [each.name for each in body if (found := _parameter(each)) and int(found[1]) == number]
    return by(given[0]) if given else 0.0


def _written(program: Program, computation: str, name: str) -> float:
    names = program.names[computation]
    part = names.get(name)
    while part is not None and part.op in ("bitcast", "reshape", "copy", "convert") and part.operands[0] in names:
        part = names[part.operands[0]]
    if part is None:
        return 0.0
    if part.op == "dynamic-update-slice" and part.operands[1] in names:
        return sum(shape.bytes for shape in names[part.operands[1]].shapes)
    inner = part.called("calls") or ""
    if part.op == "fusion" and (root := next((i for i in program.computations.get(inner, ()) if i.root), None)):
        return _written(program, inner, root.name)
    return sum(shape.bytes for shape in part.shapes)


def _size(shapes: Sequence[Shape]) -> float:
    return sum(shape.bytes for shape in shapes if shape.space == 0)
