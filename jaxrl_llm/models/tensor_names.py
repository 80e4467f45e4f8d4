"""Where each tensor of a Hugging Face checkpoint lies in our parameter tree: one table, read in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.models.transformer_specs import transformer_specs

# The axes of our leaves, one letter each: layer l, expert e, vocabulary v, width d, key/value head k, slot s (the
# queries of a key/value head, then its key, then its value), group g (its queries alone), head width h, gate or up c,
# hidden width m, chosen expert x.
LEAF_AXES = {
    "embedding": "vd",
    "unembedding": "vd",
    "final_norm": "d",
    "blocks/attention_norm": "ld",
    "blocks/attention_post_norm": "ld",
    "blocks/mlp_norm": "ld",
    "blocks/mlp_post_norm": "ld",
    "blocks/query_norm": "lh",
    "blocks/key_norm": "lh",
    "blocks/qkv": "ldksh",
    "blocks/qkv_bias": "lksh",
    "blocks/attention_out": "lkghd",
    "blocks/attention_out_bias": "ld",
    "blocks/router": "ldx",
    "blocks/gate_up": "ldcm",
    "blocks/down": "lmd",
}
EXPERT_LEAF_AXES = {"blocks/gate_up": "ledcm", "blocks/down": "lemd"}


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint, or some rows of it, as a box in one of our leaves.

    Attributes:
      tensor: its name there, with {l} for the layer and {e} for the expert.
      leaf: path in our tree.
      dims: for each dimension of the tensor the axes of our leaf that it runs over, slowest first.
      within: the part of an axis that it fills, as (start, size); axes that are not named are filled whole.
      first_row: where it starts in the tensor's first dimension, for tensors that hold several parts.
    """

    tensor: str
    leaf: str
    dims: tuple[str, ...]
    within: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    first_row: int = 0


@dataclass(frozen=True)
class Layout:
    """All parts of a family's checkpoint, and the axes that they are told in.

    Attributes:
      parts: as many as needed to fill every leaf exactly once.
      axes: letters of each leaf's dimensions.
      shapes: of our leaves.
    """

    parts: tuple[Part, ...]
    axes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def ranges(self, part: Part) -> dict[str, tuple[int, int]]:
        """(start, size) of every axis of the part's box."""
        sizes = zip(self.axes[part.leaf], self.shapes[part.leaf], strict=True)
        return {axis: part.within.get(axis, (0, size)) for axis, size in sizes}

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of the rows of the tensor that the part covers."""
        ranges = self.ranges(part)
        return tuple(math.prod(ranges[axis][1] for axis in axes) for axes in part.dims)

    def names(self, part: Part) -> Iterator[tuple[str, int, int]]:
        """(tensor name, layer, expert) of every tensor that the part stands for."""
        ranges = self.ranges(part)
        for layer in range(ranges.get("l", (0, 1))[1]):
            for expert in range(ranges.get("e", (0, 1))[1]):
                yield part.tensor.format(l=layer, e=expert), layer, expert

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in the order of the table."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            rows, *rest = self.part_shape(part)
            for name, _, _ in self.names(part):
                shapes[name] = (max(rows + part.first_row, shapes.get(name, (0,))[0]), *rest)
        return shapes


def leaves(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """A nested dict as a flat one, with paths joined by '/'."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= leaves(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def checkpoint_layout(config: TransformerConfig, architecture: str) -> Layout:
    """The table of one model of one architecture.

    Args:
      config: of the model.
      architecture: one of `families.FAMILIES`.
    """
    shapes = {path: spec.shape for path, spec in leaves(transformer_specs(config)).items()}
    axes = LEAF_AXES | (EXPERT_LEAF_AXES if config.experts is not None else {})
    attention = _fused_attention(config) if architecture == "Phi3ForCausalLM" else _split_attention(config)
    if architecture == "Phi3ForCausalLM":
        mlp = _fused_mlp(config)
    elif architecture == "MixtralForCausalLM":
        mlp = _expert_mlp("block_sparse_moe.gate", "block_sparse_moe.experts.{e}", "w1", "w3", "w2")
    elif config.experts is not None:
        mlp = _expert_mlp("mlp.gate", "mlp.experts.{e}", "gate_proj", "up_proj", "down_proj")
    else:
        mlp = _split_mlp()
    parts = [Part("model.embed_tokens.weight", "embedding", ("v", "d")), *_norms(config), *attention, *mlp]
    parts.append(Part("model.norm.weight", "final_norm", ("d",)))
    if not config.tie_embeddings:
        parts.append(Part("lm_head.weight", "unembedding", ("v", "d")))
    return Layout(tuple(parts), {path: axes[path] for path in shapes}, shapes)


_BLOCK = "model.layers.{l}."


def _norms(config: TransformerConfig) -> list[Part]:
    # "post_attention" is the norm after the attention where there is one, and else the one before the MLP.
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        names |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    parts = [Part(f"{_BLOCK}{theirs}.weight", f"blocks/{ours}", ("d",)) for ours, theirs in names.items()]
    if config.qk_norm:
        parts.append(Part(f"{_BLOCK}self_attn.q_norm.weight", "blocks/query_norm", ("h",)))
        parts.append(Part(f"{_BLOCK}self_attn.k_norm.weight", "blocks/key_norm", ("h",)))
    return parts


def _slots(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Queries, key and value as (start, size) in our fused projection."""
    group = config.queries_per_kv
    return {"q": (0, group), "k": (group, 1), "v": (group + 1, 1)}


def _split_attention(config: TransformerConfig) -> list[Part]:
    parts = []
    for name, slots in _slots(config).items():
        tensor = f"{_BLOCK}self_attn.{name}_proj."
        parts.append(Part(f"{tensor}weight", "blocks/qkv", ("ksh", "d"), {"s": slots}))
        if config.qkv_bias:
            parts.append(Part(f"{tensor}bias", "blocks/qkv_bias", ("ksh",), {"s": slots}))
    parts.append(Part(f"{_BLOCK}self_attn.o_proj.weight", "blocks/attention_out", ("d", "kgh")))
    if config.attention_out_bias:
        parts.append(Part(f"{_BLOCK}self_attn.o_proj.bias", "blocks/attention_out_bias", ("d",)))
    return parts


def _fused_attention(config: TransformerConfig) -> list[Part]:
    parts, first = [], 0
    for slots in _slots(config).values():
        parts.append(Part(f"{_BLOCK}self_attn.qkv_proj.weight", "blocks/qkv", ("ksh", "d"), {"s": slots}, first))
        first += config.kv_heads * slots[1] * config.head_size
    return [*parts, Part(f"{_BLOCK}self_attn.o_proj.weight", "blocks/attention_out", ("d", "kgh"))]


def _split_mlp() -> list[Part]:
    return [
        Part(f"{_BLOCK}mlp.gate_proj.weight", "blocks/gate_up", ("cm", "d"), {"c": (0, 1)}),
        Part(f"{_BLOCK}mlp.up_proj.weight", "blocks/gate_up", ("cm", "d"), {"c": (1, 1)}),
        Part(f"{_BLOCK}mlp.down_proj.weight", "blocks/down", ("d", "m")),
    ]


def _fused_mlp(config: TransformerConfig) -> list[Part]:
    tensor = f"{_BLOCK}mlp.gate_up_proj.weight"
    return [
        Part(tensor, "blocks/gate_up", ("cm", "d"), {"c": (0, 1)}),
        Part(tensor, "blocks/gate_up", ("cm", "d"), {"c": (1, 1)}, config.mlp_size),
        Part(f"{_BLOCK}mlp.down_proj.weight", "blocks/down", ("d", "m")),
    ]


def _expert_mlp(router: str, experts: str, gate: str, up: str, down: str) -> list[Part]:
    return [
        Part(f"{_BLOCK}{router}.weight", "blocks/router", ("x", "d")),
        Part(f"{_BLOCK}{experts}.{gate}.weight", "blocks/gate_up", ("cm", "d"), {"c": (0, 1)}),
        Part(f"{_BLOCK}{experts}.{up}.weight", "blocks/gate_up", ("cm", "d"), {"c": (1, 1)}),
        Part(f"{_BLOCK}{experts}.{down}.weight", "blocks/down", ("d", "m")),
    ]
