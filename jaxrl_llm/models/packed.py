"""Quantised weights of checkpoints, dequantised when they are read: FP8 in blocks, GPTQ and AWQ.

Slices are read in float32. A GPTQ or AWQ matrix W [outputs, inputs] is (q - zero) * scale, with one zero and one scale
for each output and each group of inputs.

Reference: DeepSeek-V3 (arXiv 2412.19437) section 3.3, GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxrl_llm.models.checkpoint_files import StoredTensor
from jaxrl_llm.models.mxfp4 import with_mxfp4

Packing = Literal["mxfp4", "fp8", "gptq", "awq"]
_WORD = 32
# Order of the eight numbers of a 32-bit word in AWQ: the lowest bits are number 0, the next ones number 2, ...
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALES = ".weight_scale_inv"
_OF_INPUTS = (".activation_scale", ".input_scale")


def packing_of(source: Mapping[str, Any], architecture: str) -> Packing | None:
    """The quantisation of the weights of a checkpoint; None if they are not quantised.

    Raises:
      ValueError: for a quantisation that is not supported.
    """
    described = source.get("quantization_config")
    if not described:
        return None
    method = described.get("quant_method")
    bits, version = described.get("bits", described.get("w_bit")), described.get("version", "gemm")
    known = {
        "mxfp4": architecture == "GptOssForCausalLM",
        "fp8": True,
        "gptq": bits in (4, 8),
        "awq": bits == 4 and str(version).lower() == "gemm",
    }
    if known.get(method, False):
        return method
    raise ValueError(
        f"config.json has quantization_config with quant_method {method!r}, bits {bits}; supported are fp8 with scales "
        "of blocks, gptq of 4 or 8 bits, awq of 4 bits (version gemm), and mxfp4 of gpt-oss; use another checkpoint"
    )


def unpacked(stored: Mapping[str, StoredTensor], source: Mapping[str, Any], packing: Packing | None) -> dict[str, Any]:
    """Stored tensors with the parts of each quantised matrix replaced by one tensor.

    Raises:
      ValueError: for missing parts.
    """
    described = source.get("quantization_config") or {}
    if packing is None:
        return dict(stored)
    if packing == "mxfp4":
        return with_mxfp4(stored)
    if packing == "fp8":
        block = tuple(described.get("weight_block_size") or ())
        names = [name.removesuffix(_SCALES) for name in stored if name.endswith(_SCALES)]
        found = {name: _parts(stored, name, ("weight", _SCALES[1:])) for name in names}
        whole = {f"{name}.weight": Fp8Tensor(block, *parts) for name, parts in found.items()}
        left = {name: x for name, x in stored.items() if not name.endswith((_SCALES, *_OF_INPUTS))}
        return left | whole
    ends = ("qweight", "qzeros", "scales")
    bits, group = int(described.get("bits") or described.get("w_bit") or 4), described.get("group_size", 128)
    offset = int(packing == "gptq" and described.get("checkpoint_format", "gptq") == "gptq")
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    whole = {
        f"{name}.weight": PackedTensor(
            packing == "awq", bits, group, offset, stored.get(f"{name}.g_idx"), *_parts(stored, name, ends)
        )
        for name in names
    }
    parts = {f"{name}.{end}" for name in names for end in (*ends, "g_idx")}
    left = {name: x for name, x in stored.items() if name not in parts}
    return left | whole


def without_empty_biases(stored: Mapping[str, Any], expected: Collection[str]) -> dict[str, Any]:
    """Stored tensors without the zero biases that GPTQ files have although the model has no biases."""
    stray = [name for name in stored if name.endswith(".bias") and name not in expected]
    empty = {name for name in stray if not np.any(stored[name].read((...,)))}
    return {name: tensor for name, tensor in stored.items() if name not in empty}


def _parts(stored: Mapping[str, StoredTensor], name: str, ends: tuple[str, ...]) -> list[StoredTensor]:
    if missing := [f"{name}.{end}" for end in ends if f"{name}.{end}" not in stored]:
        raise ValueError(f"quantised weights have no {', '.join(missing)}; copy all files of the model again")
    return [stored[f"{name}.{end}"] for end in ends]


def _bounds(ranges: tuple[Any, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [part.indices(size)[:2] for part, size in zip(ranges, shape, strict=True)]


@dataclass(frozen=True)
class Fp8Tensor:
    """A float8 matrix with one scale for each block, or one scale for all.

    Attributes:
      block: (R, C); empty if one scale is for all.
      values: [outputs, inputs].
      scales: [ceil(outputs / R), ceil(inputs / C)], or one number.
    """

    block: tuple[int, ...]
    values: StoredTensor
    scales: StoredTensor

    @property
    def dtype(self) -> str:
        """Of what is read."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.values.shape

    def read(self, ranges: tuple[Any, ...]) -> np.ndarray:
        """A box of the tensor."""
        values = self.values.read(ranges).astype(np.float32)
        if not self.block:
            return values * self.scales.read((...,)).astype(np.float32).reshape(())
        bounds = _bounds(ranges, self.shape)
        sizes = list(zip(bounds, self.block, strict=True))
        spans = [slice(start // size, -(-stop // size)) for (start, stop), size in sizes]
        scales = self.scales.read(tuple(spans)).astype(np.float32)
        at = [np.arange(*bound) // size - span.start for (bound, size), span in zip(sizes, spans, strict=True)]
        return values * scales[np.ix_(*at)]


@dataclass(frozen=True)
class PackedTensor:
    """A matrix of 4 or 8 bit integers, several in each 32-bit word.

    Attributes:
      awq: the layout is that of AWQ, else of GPTQ.
      bits: of a number; n = 32 / bits numbers are in a word.
      group: inputs in a group; -1 is one group of all inputs.
      offset: is added to the stored zeros.
      groups: group of each input; None if groups are consecutive inputs.
      words: [inputs / n, outputs] of GPTQ, [inputs, outputs / n] of AWQ.
      zeros: [groups, outputs / n].
      scales: [groups, outputs].
    """

    awq: bool
    bits: int
    group: int
    offset: int
    groups: StoredTensor | None
    words: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor

    @property
    def dtype(self) -> str:
        """Of what is read."""
        return "F32"

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor."""
        inputs = self.words.shape[0]
        return self.scales.shape[1], inputs if self.awq else inputs * (_WORD // self.bits)

    def read(self, ranges: tuple[Any, ...]) -> np.ndarray:
        """A slice of the tensor; reads only the words that overlap it."""
        outputs, inputs = _bounds(ranges, self.shape)
        every = slice(None)
        numbers = self._numbers(self.words, *((every, outputs) if self.awq else (inputs, every)))
        numbers = numbers[slice(*inputs)] if self.awq else numbers[:, slice(*outputs)]
        zeros = self._numbers(self.zeros, every, outputs) + self.offset
        scales = self.scales.read((every, slice(*outputs))).astype(np.float32)
        group = self.shape[1] if self.group < 1 else self.group
        of_input = np.arange(*inputs) // group if self.groups is None else self.groups.read((slice(*inputs),))
        return ((numbers - zeros[of_input]) * scales[of_input]).T

    def _numbers(self, words: StoredTensor, rows: Any, columns: Any) -> np.ndarray:
        """Integers of a slice; the packed axis is given as (start, stop), the other one as a slice object."""
        axis = int(isinstance(columns, tuple))
        start, stop = columns if axis else rows
        count = _WORD // self.bits
        first, last = start // count, -(-stop // count)
        read = words.read((rows, slice(first, last)) if axis else (slice(first, last), columns)).view(np.uint32)
        order = _AWQ_ORDER if self.awq else range(count)
        place = np.argsort(order).astype(np.uint32) * np.uint32(self.bits)
        spread = (read[..., None] >> place) & np.uint32(2**self.bits - 1)
        flat = np.moveaxis(spread, -1, axis + 1).reshape(
            *read.shape[:axis], read.shape[axis] * count, *read.shape[axis + 1 :]
        )
        box = slice(start - first * count, stop - first * count)
        return (flat[:, box] if axis else flat[box]).astype(np.float32)


@dataclass(frozen=True)
class OneOfMany:
    """The matrix of one expert in a tensor [experts, outputs, inputs] of all experts.

    Attributes:
      tensor: of all experts.
      expert: index of the expert.
      rows: (start, stop) of its outputs.
    """

    tensor: StoredTensor
    expert: int
    rows: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """[outputs, inputs]."""
        return self.rows[1] - self.rows[0], self.tensor.shape[2]

    @property
    def dtype(self) -> str:
        """The stored dtype."""
        return self.tensor.dtype

    def read(self, ranges: tuple[Any, ...]) -> np.ndarray:
        """A slice of the matrix."""
        (start, stop), columns = _bounds(ranges, self.shape)
        rows = slice(self.rows[0] + start, self.rows[0] + stop)
        return self.tensor.read((slice(self.expert, self.expert + 1), rows, slice(*columns)))[0]


def with_split_experts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored tensors, with each tensor of all experts (gate above up) split into matrices of experts."""
    apart: dict[str, Any] = {}
    for name, tensor in stored.items():
        prefix, _, last = name.rpartition(".experts.")
        if not prefix or last not in ("gate_up_proj", "down_proj"):
            apart[name] = tensor
            continue
        height = tensor.shape[1]
        boxes = {"down": (0, height)}
        if last == "gate_up_proj":
            boxes = {"gate": (0, height // 2), "up": (height // 2, height)}
        for expert in range(tensor.shape[0]):
            for part, rows in boxes.items():
                apart[f"{prefix}.experts.{expert}.{part}_proj.weight"] = OneOfMany(tensor, expert, rows)
    return apart
