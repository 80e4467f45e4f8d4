"""MXFP4 weights, the format of gpt-oss: blocks of 32 four-bit numbers with a shared power of two.

Reference: OCP Microscaling Formats (MX) specification, v1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.models.checkpoint_files import StoredTensor

# E2M1 (one sign bit, two exponent bits, one mantissa bit): the value of each four-bit code.
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BLOCK, _EXPONENT_BIAS = 32, 127
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4Tensor:
    """A tensor [E, I, O] of all experts that is stored as [E, O, I] in blocks along I.

    Attributes:
      blocks: [E, O, I / 32, 16], two numbers per byte, the first one in the lower four bits.
      scales: [E, O, I / 32], exponents of two with a bias of 127.
    """

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, I, O]."""
        experts, outputs, blocks, _ = self.blocks.shape
        return experts, blocks * _BLOCK, outputs

    @property
    def dtype(self) -> str:
        """A dtype that represents its numbers exactly."""
        return "BF16"

    def read(self, ranges: tuple[Any, ...]) -> np.ndarray:
        """A slice of the tensor, in float32; reads only the blocks that overlap it."""
        experts, inputs, outputs = ranges
        start, stop, _ = inputs.indices(self.shape[1])
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        packed = self.blocks.read((experts, outputs, slice(first, last), slice(None)))
        exponents = self.scales.read((experts, outputs, slice(first, last))).astype(np.int32) - _EXPONENT_BIAS
        numbers = _VALUES[np.stack([packed & 0x0F, packed >> 4], axis=-1)]
        numbers = np.ldexp(numbers, exponents[..., None, None]).reshape(*packed.shape[:2], -1)
        return numbers[..., start - first * _BLOCK : stop - first * _BLOCK].swapaxes(1, 2)


def with_mxfp4(stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Stored tensors with each pair of blocks and scales replaced by one `Mxfp4Tensor`."""
    packed = [name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)]
    parts = {name + end for name in packed for end in (_BLOCKS, _SCALES)}
    if missing := sorted(name for name in parts if name not in stored):
        raise ValueError(f"MXFP4 weights have no {', '.join(missing)}; copy all files of the model again")
    plain = {name: tensor for name, tensor in stored.items() if name not in parts}
    return plain | {name: Mxfp4Tensor(stored[name + _BLOCKS], stored[name + _SCALES]) for name in packed}
