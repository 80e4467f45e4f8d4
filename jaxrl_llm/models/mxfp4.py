"""MXFP4 weights, as gpt-oss is published in: blocks of 32 numbers of four bits that share a power of two.

Reference: OCP Microscaling Formats (MX) specification, v1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.models.checkpoint_files import StoredTensor

# E2M1: a sign, two bits of exponent, one of mantissa; by its four bits.
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BLOCK, _EXPONENT_BIAS = 32, 127
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4Tensor:
    """A tensor [E, I, O] of all experts that is stored as [E, O, I] in blocks along I.

    Attributes:
      blocks: [E, O, I / 32, 16], two numbers a byte, the first one in the lower half.
      scales: [E, O, I / 32], exponents of two above -127.
    """

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        experts, outputs, blocks, _ = self.blocks.shape
        return experts, blocks * _BLOCK, outputs

    @property
    def dtype(self) -> str:
        """That holds its numbers without rounding."""
        return "BF16"

    def read(self, ranges: tuple[Any, ...]) -> np.ndarray:
        """A box of the tensor, in float32; only the blocks that it touches are read."""
        experts, inputs, outputs = ranges
        start, stop, _ = inputs.indices(self.shape[1])
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        packed = self.blocks.read((experts, outputs, slice(first, last), slice(None)))
        exponents = self.scales.read((experts, outputs, slice(first, last))).astype(np.int32) - _EXPONENT_BIAS
        numbers = _VALUES[np.stack([packed & 0x0F, packed >> 4], axis=-1)]
        numbers = np.ldexp(numbers, exponents[..., None, None]).reshape(*packed.shape[:2], -1)
        return numbers[..., start - first * _BLOCK : stop - first * _BLOCK].swapaxes(1, 2)


def with_mxfp4(stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Stored tensors with each pair of blocks and scales as the one tensor that they are."""
    packed = [name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)]
    parts = {name + end for name in packed for end in (_BLOCKS, _SCALES)}
    if missing := sorted(name for name in parts if name not in stored):
        raise ValueError(f"MXFP4 weights lack {', '.join(missing)}; copy all files of the model again")
    plain = {name: tensor for name, tensor in stored.items() if name not in parts}
    return plain | {name: Mxfp4Tensor(stored[name + _BLOCKS], stored[name + _SCALES]) for name in packed}
