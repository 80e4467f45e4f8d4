"""Operations, memory traffic and communication of one instruction of a compiled program."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrl_llm.planning.program_text import Instruction, Program, Shape, parameter, shapes_in


def _groups(one: Instruction, devices: int) -> list[list[int]]:
    """The groups of devices of a collective."""
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


def sent_bytes(one: Instruction, devices: int) -> tuple[float, list[list[int]]]:
    """Bytes sent by a device in a ring, and the groups."""
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


def flops(one: Instruction, scope: Mapping[str, Instruction]) -> float:
    """Operations of matrix products and attention kernels, given the instructions beside it."""
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
    """Number of pairs of an output and a window position that fall on an element of the input."""
    at = np.arange(out)[:, None] * stride - low + np.arange(size)[None, :] * spread
    return int(((at >= 0) & (at % dilate == 0) & (at // dilate < length)).sum())


def _attention(one: Instruction) -> float:
    """Operations of a splash attention kernel: half of the full products, as attention is causal."""
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", one.origin)
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", one.attributes)
    if kind is None or operands is None:
        return 0.0
    arrays = [shape.sizes for shape in shapes_in(operands[1]) if shape.dtype in ("bf16", "f32", "f16")]
    if len(arrays) < 2 or len(arrays[0]) < 3:
        return 0.0
    queries, keys = arrays[0], arrays[1]
    products = {"fwd": 2, "dq": 3, "dkv": 4}[kind[1]]
    return products * 2.0 * math.prod(queries) * keys[-2] / 2


def traffic(program: Program, names: Mapping[str, Instruction], one: Instruction) -> float:
    """Bytes read from and written to the large memory; for a slice of an array, the size of the slice."""
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


def _read(program: Program, computation: str, number: int) -> float:
    """Bytes of a parameter that a fused computation reads; infinity for the whole parameter."""
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

    given = [each.name for each in body if (found := parameter(each)) and int(found[1]) == number]
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
