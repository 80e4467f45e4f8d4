"""Low-rank adapters (LoRA) as a transformation of the parameter tree.

A matrix W of every block is replaced by a node with W, which is frozen, and two narrow trained matrices:

    W + scale * down @ up,    down: [inputs, rank],    up: [rank, outputs], zero at the start

Our blocks hold fused matrices (query, key and value in one, gate and up in one), and a fused matrix gets one adapter:
its parts share `down`, so that rank r here is at least as expressive as rank r / 3 (or r / 2) on each part. Each expert
of a mixture has an adapter of its own; while a layer is computed, the sums of its experts and theirs are in memory.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PyTree

from jaxrl_llm.models.int4 import QuantisedInGroups, dequantised_groups, quantised_in_groups, quantised_in_groups_spec
from jaxrl_llm.models.int8 import Quantised, dequantised, quantised, quantised_spec
from jaxrl_llm.models.model import Model, Trained
from jaxrl_llm.models.parameters import ParameterSpec, initialise
from jaxrl_llm.models.transformer_config import STACKS

# The matrices of a block that can have an adapter, and the number of their input axes.
TARGETS = {"qkv": 1, "attention_out": 3, "gate_up": 1, "down": 1}
# Further matrices of some models: latent attention, the MLP beside experts, and gated delta-nets.
TARGETS |= dict.fromkeys(("query_down", "query_up", "latent_down", "shared_gate_up", "shared_down", "delta_in"), 1)
TARGETS |= {"delta_out": 3}
_USUAL = ("qkv", "attention_out", "gate_up", "down")
# A mixture of experts has one of these for every expert.
OF_EXPERTS = ("gate_up", "down")
Bits = Literal[0, 4, 8]
# How matrices under adapters are stored: (arrays, specs).
_STORED: Mapping[Bits, tuple[Callable | None, Callable | None]] = {
    0: (None, None),
    4: (quantised_in_groups, quantised_in_groups_spec),
    8: (quantised, quantised_spec),
}


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices have an adapter, and its size.

    Attributes:
      rank: columns of `down` and rows of `up`.
      alpha: the adapter's part is scaled by alpha / rank.
      targets: matrices of each block: qkv (one adapter for the fused query, key and value projections), attention_out,
        gate_up (one for both), down, of the MLP or of every expert; query_down, query_up and latent_down of latent
        attention; shared_gate_up and shared_down of the MLP beside experts; delta_in and delta_out of gated delta-nets.
      rank_stabilised: scaled by alpha / sqrt(rank) instead (rsLoRA), with which learning does not slow down as the
        rank grows.

    Reference: LoRA (2106.09685), rsLoRA (2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = _USUAL
    rank_stabilised: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}; it scales the adapters and must be above 0")
        if not self.targets:
            raise ValueError(f"lora.targets is empty; name at least one of {', '.join(TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                near = difflib.get_close_matches(target, TARGETS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(TARGETS)}"
                raise ValueError(f"lora.targets names {target!r}, which is no matrix of a block; {hint}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets names one matrix twice: {', '.join(self.targets)}; name each once")

    @property
    def scale(self) -> float:
        """Factor on down @ up."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@struct.dataclass
class LowRank:
    """A matrix with its adapter; it replaces the matrix in the tree. A stack of layers is indexed and scanned like an
    array.

    Attributes:
      base: [L, *I, *O], frozen; an array, in int8 or in int4. Of experts [L, E, *I, *O], and E in the others likewise.
      down: [L, *I, rank].
      up: [L, rank, *O].
      scale: factor on their product.
    """

    base: Any
    down: Any
    up: Any
    scale: float = struct.field(pytree_node=False)


def _stacked(blocks: Mapping[str, Any], target: str) -> int:
    """Number of axes of a matrix before its inputs: layers, and experts if each expert has one."""
    return 2 if "router" in blocks and target in OF_EXPERTS else 1


def adapter_specs(blocks: Mapping[str, Any], config: LoraConfig) -> dict[str, dict[str, ParameterSpec]]:
    """Specs of the adapters of a config, {target: {"down", "up"}}.

    `down` is normal with variance 1 / inputs and `up` is zero, so the outputs of the model are unchanged at the start.
    Both are float32.

    Args:
      blocks: stacked blocks, as specs or as arrays.
      config: its rank and targets are used.

    Raises:
      ValueError: for a target that these blocks do not have.
    """
    specs = {}
    for target in config.targets:
        leaf = blocks.get(target)
        if leaf is None or isinstance(leaf, LowRank):
            state = "the blocks do not have" if leaf is None else "has an adapter already (see merged)"
            raise ValueError(f"lora.targets names {target!r}, which {state}; they have {', '.join(sorted(blocks))}")
        axes = getattr(leaf, "axes", (None,) * len(leaf.shape))
        first = _stacked(blocks, target)
        last = first + TARGETS[target]
        scale = math.prod(leaf.shape[first:last]) ** -0.5
        specs[target] = {
            "down": ParameterSpec((*leaf.shape[:last], config.rank), (*axes[:last], None), scale),
            "up": ParameterSpec(
                (*leaf.shape[:first], config.rank, *leaf.shape[last:]),
                (*axes[:first], None, *axes[last:]),
                0.0,
                fill=0.0,
            ),
        }
    return specs


def add_adapters(params: PyTree, config: LoraConfig, key: Array, *, bits: Bits = 0) -> PyTree:
    """Parameters with adapters in their blocks; the outputs of the model are unchanged.

    Args:
      params: stacked blocks, as `transformer_specs` describes.
      config: rank, alpha and targets.
      key: each `down` is drawn with a key addressed by its path.
      bits: of the matrices under the adapters: 8 or 4, which changes the model's outputs, or 0 to keep them.

    Raises:
      ValueError: for a target that these parameters do not have.
    """
    drawn = initialise(_adapters_of(params, config), key)
    return _with_adapters(params, drawn, config.scale, _STORED[bits][0])


def _adapters_of(tree: PyTree, config: LoraConfig) -> dict[str, dict]:
    """Specs of adapters in each stack of blocks; a stack may lack matrices that others have."""
    stacks = [stack for stack in STACKS if stack in tree]
    everywhere = {name: leaf for stack in stacks for name, leaf in tree[stack].items()}
    adapter_specs(everywhere, config)  # raises for matrices that no stack has
    found = {}
    for stack in stacks:
        there = tuple(name for name in config.targets if name in tree[stack])
        found[stack] = adapter_specs(tree[stack], replace(config, targets=there)) if there else {}
    return found


def _with_adapters(tree: PyTree, adapters: Mapping[str, Any], scale: float, stored: Callable | None) -> PyTree:
    """`tree` holds arrays or specs, and `adapters` too."""

    def node(name: str, leaf: Any, adapter: Mapping[str, Any], first: int) -> Any:
        base = leaf if stored is None else stored(leaf, inputs=TARGETS[name], stacked=first)
        return LowRank(base, **adapter, scale=scale)

    stacks = {
        stack: {
            name: node(name, leaf, own[name], _stacked(tree[stack], name)) if name in own else leaf
            for name, leaf in tree[stack].items()
        }
        for stack, own in adapters.items()
    }
    return tree | stacks


def stored_in_int8(params: PyTree, *, stored: Callable = quantised) -> PyTree:
    """Parameters whose block matrices are in int8; tables and norms are unchanged.

    Args:
      params: stacked blocks, as `transformer_specs` describes; or its specs.
      stored: (matrix, inputs, stacked) -> its stored form: `quantised`, or `quantised_spec` for specs.
    """

    def node(stack: Mapping[str, Any], name: str, leaf: Any) -> Any:
        if name not in TARGETS or isinstance(leaf, LowRank | Quantised):
            return leaf
        return stored(leaf, inputs=TARGETS[name], stacked=_stacked(stack, name))

    stacks = {name: params[name] for name in STACKS if name in params}
    return params | {
        at: {name: node(stack, name, leaf) for name, leaf in stack.items()} for at, stack in stacks.items()
    }


def in_int8(model: Model) -> Model:
    """The same model with its matrices in int8 (`stored_in_int8`), for a network that does not learn.

    Raises:
      ValueError: for a model whose parameters have no stacked blocks.
    """
    if not isinstance(model.specs, Mapping) or not isinstance(model.specs.get("blocks"), Mapping):
        raise ValueError("int8 is set, but the parameters of this model have no stacked blocks; leave it out")
    specs = stored_in_int8(model.specs, stored=quantised_spec)
    return model._replace(init=lambda key: stored_in_int8(model.init(key)), specs=specs)


def split(params: PyTree) -> tuple[dict[str, Any], PyTree]:
    """(adapters, rest): the trained part as a tree of {"down", "up"} in the places of the matrices, and the frozen part
    with nodes whose adapter is None. No array is copied."""
    if isinstance(params, LowRank):
        return {"down": params.down, "up": params.up}, replace(params, down=None, up=None)
    if not isinstance(params, Mapping):
        return {}, params
    parts = {name: split(value) for name, value in params.items()}
    return {name: part for name, (part, _) in parts.items() if part}, {name: rest for name, (_, rest) in parts.items()}


def join(trained: Mapping[str, Any], frozen: PyTree) -> PyTree:
    """The inverse of `split`."""
    if isinstance(frozen, LowRank):
        return replace(frozen, down=trained["down"], up=trained["up"])
    if not isinstance(frozen, Mapping):
        return frozen
    return {name: join(trained[name], value) if name in trained else value for name, value in frozen.items()}


def without_adapters(params: PyTree) -> PyTree:
    """The parameters without adapters, the same arrays in their original places. They are the reference policy."""
    return _mapped(lambda node: node.base if isinstance(node, LowRank) else node, params)


def merged(params: PyTree) -> PyTree:
    """Plain parameters with equal outputs: base + scale * down @ up, in the dtype of the base, also if it is
    quantised."""
    return _mapped(_merged, params)


def _merged(node: LowRank | Quantised | QuantisedInGroups) -> Float[Array, "L ..."]:
    if not isinstance(node, LowRank):
        return _wide(node)
    base = _wide(node.base)
    rank, stacked = node.down.shape[-1], node.down.ndim + node.up.ndim - 2 - base.ndim
    first = node.up.shape[:stacked]
    down, up = node.down.reshape(*first, -1, rank), node.up.reshape(*first, rank, -1)
    change = jnp.matmul(down, up, precision="highest", preferred_element_type=jnp.float32).reshape(base.shape)
    return (base.astype(jnp.float32) + node.scale * change).astype(base.dtype)


def _wide(node: Any) -> Array:
    """The full matrix of a quantised one; an array is returned unchanged."""
    if isinstance(node, QuantisedInGroups):
        return dequantised_groups(node)
    return dequantised(node) if isinstance(node, Quantised) else node


def plain_matrix(node: Array | LowRank | Quantised | QuantisedInGroups, dtype: Any) -> Array:
    """Matrices of one layer as an array of this dtype, from any storage format."""
    return (_merged(node) if isinstance(node, LowRank | Quantised | QuantisedInGroups) else node).astype(dtype)


def _mapped(function: Callable, params: PyTree) -> PyTree:
    """Apply a function to the nodes that are not arrays."""
    special = lambda leaf: isinstance(leaf, LowRank | Quantised | QuantisedInGroups)  # noqa: E731
    return jax.tree.map(lambda leaf: function(leaf) if special(leaf) else leaf, params, is_leaf=special)


def lora(model: Model, config: LoraConfig, *, bits: Bits = 0) -> Model:
    """The same model with adapters; training changes only the adapters.

    Args:
      model: a transformer.
      config: rank, alpha and targets.
      bits: of the matrices under the adapters: 8, or 4 as in QLoRA (2305.14314); 0 keeps them.

    Raises:
      ValueError: for a model whose parameters have no stacked blocks.

    >>> from jaxrl_llm.models import TransformerConfig, parameter_count, transformer
    >>> base = transformer(TransformerConfig(vocabulary_size=11, width=16, layers=1, heads=2, kv_heads=1))
    >>> adapted = lora(base, LoraConfig(rank=2, alpha=4, targets=("down",)))
    >>> trained, frozen = split(adapted.init(jax.random.key(0)))
    >>> jax.tree.map(jnp.shape, trained)
    {'blocks': {'down': {'down': (1, 48, 2), 'up': (1, 2, 16)}}}
    """
    if not isinstance(model.specs, Mapping) or not isinstance(model.specs.get("blocks"), Mapping):
        raise ValueError("lora is set, but the parameters of this model have no stacked blocks; adapt a transformer")
    adapters = _adapters_of(model.specs, config)
    return model._replace(
        init=lambda key: add_adapters(model.init(key), config, key, bits=bits),
        specs=_with_adapters(model.specs, adapters, config.scale, _STORED[bits][1]),
        trained=Trained(split, join, reference=without_adapters, merged=merged),
    )
