"""The table between the tensors of a Hugging Face checkpoint and our parameter tree, used for import and export."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.models.transformer_specs import transformer_specs

# The axes of our leaves, one letter each: layer l, expert e, vocabulary v, width d, key/value head k, slot s (the
# queries of a key/value head, then its key, then its value), group g (only its queries), head width h, gate or up c,
# hidden width m, output of the router x, size one z, latent width r, head n, token of a convolution w, layer of a leaf
# that is not in a stack q, width of a layer's embedding p.
LEAF_AXES = {"embedding": "vd", "unembedding": "vd", "final_norm": "d"}
LEAF_AXES |= {"per_layer_embedding": "vqp", "per_layer_projection": "dqp", "per_layer_norm": "p"}
BLOCK_AXES = {
    "attention_norm": "ld",
    "attention_post_norm": "ld",
    "mlp_norm": "ld",
    "mlp_post_norm": "ld",
    "query_norm": "lh",
    "key_norm": "lh",
    "qkv": "ldksh",
    "qkv_bias": "lksh",
    "query_down": "ldr",
    "query_up": "lrnh",
    "latent_down": "ldr",
    "latent_norm": "lr",
    "latent_up": "lrnh",
    "attention_out": "lkghd",
    "attention_out_bias": "ld",
    "sinks": "lkg",
    "per_layer_gate": "ldp",
    "per_layer_up": "lpd",
    "per_layer_post_norm": "ld",
    "layer_scale": "lz",
    "delta_in": "ldkh",
    "delta_gates": "ldkg",
    "delta_conv": "lkhzw",
    "delta_decay": "lkg",
    "delta_rate": "lkg",
    "delta_norm": "lh",
    "delta_out": "lkghd",
    "experts_norm": "ld",
    "experts_post_norm": "ld",
    "shared_post_norm": "ld",
    "router_gain": "ld",
    "expert_factor": "lx",
    "router": "ldx",
    "router_bias": "lx",
    "selection_bias": "lx",
    "gate_up": "ldcm",
    "gate_up_bias": "lcm",
    "down": "lmd",
    "down_bias": "ld",
    "shared_gate_up": "ldcm",
    "shared_down": "lmd",
    "shared_gate": "ldz",
}
EXPERT_AXES = {"gate_up": "ledcm", "gate_up_bias": "lecm", "down": "lemd", "down_bias": "led"}
ALL_HEADS_AXES = {"query_norm": "lkgh", "key_norm": "lkh"}
LATENT_AXES = {"query_norm": "lr"}


# Leaves that are always float32, here and in checkpoints.
IN_FLOAT32 = ("selection_bias",)


@dataclass(frozen=True)
class Naming:
    """Names and layouts of an architecture that differ from those of Llama and Qwen.

    Attributes:
      fused_qkv: queries, keys and values are one tensor.
      fused_gate_up: gate and up are one tensor.
      fused_delta: the projections of gated delta-net layers are one tensor, ordered by key head.
      norms: our name of a norm -> its name in the checkpoint.
      router: name of the router.
      experts: name of one expert, with {e}; without {e} of the tensors of all experts.
      outputs_first: tensors of all experts have outputs before inputs, and gate above up.
      matrices: names of gate, up and down of an expert.
      shared: name of the MLP of shared experts.
    """

    fused_qkv: bool = False
    fused_gate_up: bool = False
    fused_delta: bool = False
    norms: Mapping[str, str] = field(default_factory=dict)
    router: str = "mlp.gate"
    experts: str = "mlp.experts.{e}"
    outputs_first: bool = False
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_expert"


_NAMING = {
    "Phi3ForCausalLM": Naming(fused_qkv=True, fused_gate_up=True),
    "MixtralForCausalLM": Naming(
        router="block_sparse_moe.gate", experts="block_sparse_moe.experts.{e}", matrices=("w1", "w3", "w2")
    ),
    "GptOssForCausalLM": Naming(router="mlp.router", experts="mlp.experts"),
    "Gemma4ForCausalLM": Naming(
        norms={
            "experts_norm": "pre_feedforward_layernorm_2",
            "experts_post_norm": "post_feedforward_layernorm_2",
            "shared_post_norm": "post_feedforward_layernorm_1",
        },
        router="router.proj",
        experts="experts",
        outputs_first=True,
        shared="mlp",
    ),
    "Qwen3NextForCausalLM": Naming(fused_delta=True),
    "Glm4MoeForCausalLM": Naming(shared="mlp.shared_experts"),
    "DeepseekV3ForCausalLM": Naming(shared="mlp.shared_experts"),
    "Glm4ForCausalLM": Naming(
        fused_gate_up=True,
        norms={
            "attention_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
    ),
}


_MOST_TENSORS = 500_000


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint, or some of its rows, and the slice of one of our leaves that it fills.

    Attributes:
      tensor: its name in the checkpoint, with {l} for the layer and {e} for the expert.
      leaf: path in our tree.
      dims: for each dimension of the tensor the axes of our leaf that it has, slowest first.
      within: axis -> (start, size) of the slice; axes that are not listed are whole.
      first_row: first row of the part in the tensor's first dimension, for tensors that have several parts.
    """

    tensor: str
    leaf: str
    dims: tuple[str, ...]
    within: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    first_row: int = 0

    @property
    def holds_experts(self) -> bool:
        """Whether the tensor has all experts."""
        return any("e" in axes for axes in self.dims)


@dataclass(frozen=True)
class Layout:
    """All parts of a checkpoint, and the axes of our leaves.

    Attributes:
      parts: together they fill every leaf exactly once.
      axes: letters of each leaf's dimensions.
      shapes: of our leaves.
      layers: indices of the layers of each stack of blocks.
    """

    parts: tuple[Part, ...]
    axes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, tuple[int, ...]]

    def ranges(self, part: Part) -> dict[str, tuple[int, int]]:
        """(start, size) of every axis of the slice that the part fills."""
        sizes = zip(self.axes[part.leaf], self.shapes[part.leaf], strict=True)
        return {axis: part.within.get(axis, (0, size)) for axis, size in sizes}

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of the rows of the tensor that the part covers."""
        ranges = self.ranges(part)
        return tuple(math.prod(ranges[axis][1] for axis in axes) for axes in part.dims)

    def name(self, part: Part, layer: int, expert: int) -> str:
        """Name of the tensor for one layer of a stack and one expert."""
        numbers = self.layers.get(part.leaf.split("/")[0])
        return part.tensor.format(l=layer if numbers is None else numbers[layer], e=expert)

    def names(self, part: Part) -> Iterator[tuple[str, int, int]]:
        """(tensor name, layer of its stack, expert) of every tensor of the part."""
        ranges = self.ranges(part)
        for layer in range(ranges.get("l", (0, 1))[1]):
            for expert in range(1 if part.holds_experts else ranges.get("e", (0, 1))[1]):
                yield self.name(part, layer, expert), layer, expert

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in the order of the table.

        Raises:
          ValueError: for an implausible number of tensors.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            rows, *rest = self.part_shape(part)
            for name, _, _ in self.names(part):
                if len(shapes) >= _MOST_TENSORS:
                    raise ValueError(f"config.json describes more than {_MOST_TENSORS:,} tensors; copy the file again")
                shapes[name] = (max(rows + part.first_row, shapes.get(name, (0,))[0]), *rest)
        return shapes


def layer_of(name: str) -> int | None:
    """Index of the layer that a tensor of a checkpoint belongs to; None if it belongs to no layer."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


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
    naming = _NAMING.get(architecture, Naming())
    parts = [Part("model.embed_tokens.weight", "embedding", ("v", "d"))]
    axes = dict(LEAF_AXES)
    for stack in config.stacks:
        routed = f"{stack}/router" in shapes
        own = BLOCK_AXES | (EXPERT_AXES if routed else {})
        own |= ALL_HEADS_AXES if config.qk_norm_span == "all_heads" else {}
        own |= LATENT_AXES if config.latent is not None else {}
        axes |= {f"{stack}/{name}": letters for name, letters in own.items()}
        mlp = _experts(naming) if routed else _mlp(naming, "mlp", "", _dense_width(shapes, stack))
        heads = _delta(config, naming) if stack == "delta_blocks" else _attention(config, stack, naming)
        heads = heads if config.latent is None else _latent(config)
        block = [*_norms(config, naming), *heads, *mlp, *_PER_LAYER]
        parts += [
            replace(part, tensor=f"model.layers.{{l}}.{part.tensor}", leaf=f"{stack}/{part.leaf}") for part in block
        ]
    parts += [
        Part("model.embed_tokens_per_layer.weight", "per_layer_embedding", ("v", "qp")),
        Part("model.per_layer_model_projection.weight", "per_layer_projection", ("qp", "d")),
        Part("model.per_layer_projection_norm.weight", "per_layer_norm", ("p",)),
    ]
    parts += [Part("model.norm.weight", "final_norm", ("d",)), Part("lm_head.weight", "unembedding", ("v", "d"))]
    # Parts whose leaf the model does not have are not in the checkpoint.
    present = tuple(part for part in parts if part.leaf in shapes)
    return Layout(present, {path: axes[path] for path in shapes}, shapes, config.stacks)


def _dense_width(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    return shapes[f"{stack}/gate_up"][-1]


_PER_LAYER = [
    Part("per_layer_input_gate.weight", "per_layer_gate", ("p", "d")),
    Part("per_layer_projection.weight", "per_layer_up", ("d", "p")),
    Part("post_per_layer_input_norm.weight", "per_layer_post_norm", ("d",)),
    Part("layer_scalar", "layer_scale", ("z",)),
]


def _norms(config: TransformerConfig, naming: Naming) -> list[Part]:
    # "post_attention" is the norm after the attention in models that have one, else the norm before the MLP.
    names = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        **naming.norms,
    }
    parts = [Part(f"{theirs}.weight", ours, ("d",)) for ours, theirs in names.items()]
    if not config.qk_norm:
        return parts
    spans = ("kgh", "kh") if config.qk_norm_span == "all_heads" else ("h", "h")
    return [
        *parts,
        Part("self_attn.q_norm.weight", "query_norm", spans[:1]),
        Part("self_attn.k_norm.weight", "key_norm", spans[1:]),
    ]


def _attention(whole: TransformerConfig, stack: str, naming: Naming) -> list[Part]:
    # Slices (start, size) of queries, key and value in our fused projection.
    config, slots_there = whole.of_stack(stack), whole.slots_of(stack)
    group, parts, first = config.queries_per_kv * (2 if config.attention_gate else 1), [], 0
    kinds = {"q": (0, group), "k": (group, 1), "v": (group + 1, 1)}
    for name, slots in {name: slots for name, slots in kinds.items() if slots[0] < slots_there}.items():
        tensor = "self_attn.qkv_proj." if naming.fused_qkv else f"self_attn.{name}_proj."
        row = first if naming.fused_qkv else 0
        parts.append(Part(f"{tensor}weight", "qkv", ("ksh", "d"), {"s": slots}, row))
        parts.append(Part(f"{tensor}bias", "qkv_bias", ("ksh",), {"s": slots}, row))
        first += config.kv_heads * slots[1] * config.head_size
    return [
        *parts,
        Part("self_attn.o_proj.weight", "attention_out", ("d", "kgh")),
        Part("self_attn.o_proj.bias", "attention_out_bias", ("d",)),
        Part("self_attn.sinks", "sinks", ("kg",)),
    ]


def _delta(config: TransformerConfig, naming: Naming) -> list[Part]:
    """Order in one key head: query, key, values, gates of the values; write strengths of the values, decay rates."""
    delta = config.delta
    assert delta is not None
    key, group, values = delta.key_width, delta.values_per_key, delta.values_per_key * delta.value_width
    boxes = [(0, key), (key, key), (2 * key, values)]
    rows = [delta.key_heads * start for start, _ in boxes]
    parts = [
        Part("conv1d.weight", "delta_conv", ("kh", "z", "w"), {"h": box}, row)
        for box, row in zip(boxes, rows, strict=True)
    ]
    if naming.fused_delta:
        parts += [
            Part("in_proj_qkvz.weight", "delta_in", ("kh", "d")),
            Part("in_proj_ba.weight", "delta_gates", ("kg", "d")),
        ]
    else:
        named = [("qkv", box, row) for box, row in zip(boxes, rows, strict=True)]
        named.append(("z", (delta.mixed_width, values), 0))
        parts += [Part(f"in_proj_{name}.weight", "delta_in", ("kh", "d"), {"h": box}, row) for name, box, row in named]
        parts += [
            Part(f"in_proj_{name}.weight", "delta_gates", ("kg", "d"), {"g": (start, group)})
            for name, start in (("b", 0), ("a", group))
        ]
    parts += [
        Part("A_log", "delta_decay", ("kg",)),
        Part("dt_bias", "delta_rate", ("kg",)),
        Part("norm.weight", "delta_norm", ("h",)),
        Part("out_proj.weight", "delta_out", ("d", "kgh")),
    ]
    return [replace(part, tensor=f"linear_attn.{part.tensor}") for part in parts]


def _latent(config: TransformerConfig) -> list[Part]:
    narrow = config.latent is not None and config.latent.query_rank is not None
    return [
        Part("self_attn.q_a_proj.weight", "query_down", ("r", "d")),
        Part("self_attn.q_a_layernorm.weight", "query_norm", ("r",)),
        Part(f"self_attn.{'q_b_proj' if narrow else 'q_proj'}.weight", "query_up", ("nh", "r")),
        Part("self_attn.kv_a_proj_with_mqa.weight", "latent_down", ("r", "d")),
        Part("self_attn.kv_a_layernorm.weight", "latent_norm", ("r",)),
        Part("self_attn.kv_b_proj.weight", "latent_up", ("nh", "r")),
        Part("self_attn.o_proj.weight", "attention_out", ("d", "kgh")),
    ]


def _mlp(naming: Naming, theirs: str, ours: str, width: int) -> list[Part]:
    """A gated MLP; `theirs` is the prefix of its tensors, `ours` that of its leaves."""
    gate, up, down = naming.matrices
    parts = []
    for column, name in enumerate((gate, up)):
        tensor = f"{theirs}.gate_up_proj" if naming.fused_gate_up else f"{theirs}.{name}"
        row = column * width if naming.fused_gate_up else 0
        parts.append(Part(f"{tensor}.weight", f"{ours}gate_up", ("cm", "d"), {"c": (column, 1)}, row))
        parts.append(Part(f"{tensor}.bias", f"{ours}gate_up_bias", ("cm",), {"c": (column, 1)}, row))
    return [
        *parts,
        Part(f"{theirs}.{down}.weight", f"{ours}down", ("d", "m")),
        Part(f"{theirs}.{down}.bias", f"{ours}down_bias", ("d",)),
    ]


def _experts(naming: Naming) -> list[Part]:
    return [
        Part(f"{naming.router}.weight", "router", ("x", "d")),
        Part(f"{naming.router}.bias", "router_bias", ("x",)),
        Part(f"{naming.router}.e_score_correction_bias", "selection_bias", ("x",)),
        Part("router.scale", "router_gain", ("d",)),
        Part("router.per_expert_scale", "expert_factor", ("x",)),
        *(_mlp(naming, naming.experts, "", 0) if "{e}" in naming.experts else _all_experts(naming)),
        *_mlp(naming, naming.shared, "shared_", 0),
        Part(f"{naming.shared}_gate.weight", "shared_gate", ("z", "d")),
    ]


def _all_experts(naming: Naming) -> list[Part]:
    """All experts in one tensor: inputs first with gate and up interleaved, or outputs first with gate above up."""
    theirs = naming.experts
    first = naming.outputs_first
    return [
        Part(f"{theirs}.gate_up_proj", "gate_up", ("e", "cm", "d") if first else ("e", "d", "mc")),
        Part(f"{theirs}.gate_up_proj_bias", "gate_up_bias", ("e", "mc")),
        Part(f"{theirs}.down_proj", "down", ("e", "d", "m") if first else ("e", "m", "d")),
        Part(f"{theirs}.down_proj_bias", "down_bias", ("e", "d")),
    ]
