"""The families of which some layers are no attention: what their `config.json` says beyond the common fields."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.expert_families import qwen_experts, qwen_experts_json, require_experts_everywhere
from jaxrl_llm.models.family import Family, Json, llama_fields, shortest_pattern
from jaxrl_llm.models.layer_kinds import DeltaConfig
from jaxrl_llm.models.transformer_config import TransformerConfig


def _delta_pattern(source: Json) -> tuple[bool, ...]:
    layers, every = source["num_hidden_layers"], source.get("full_attention_interval") or 4
    plain = ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    kinds = source.get("layer_types") or plain
    if unknown := sorted(set(kinds) - {"linear_attention", "full_attention"}):
        raise ValueError(
            f"config.json has layer_types with {', '.join(unknown)}; only linear_attention and full_attention are "
            "supported in this family"
        )
    return shortest_pattern(tuple(kind == "linear_attention" for kind in kinds))


def _qwen3_5_fields(source: Json) -> dict[str, Any]:
    delta = DeltaConfig(
        key_heads=source["linear_num_key_heads"],
        value_heads=source["linear_num_value_heads"],
        key_width=source["linear_key_head_dim"],
        value_width=source["linear_value_head_dim"],
        kernel=source["linear_conv_kernel_dim"],
        pattern=_delta_pattern(source),
    )
    own = {"qk_norm": True, "norm_offset": 1.0, "attention_gate": True, "mlp_bias": False}
    return llama_fields(source) | own | {"delta": delta if any(delta.pattern) else None}


def _qwen3_5_moe_fields(source: Json) -> dict[str, Any]:
    experts = qwen_experts(source, shared_width=source["shared_expert_intermediate_size"], shared_gate=True)
    return _qwen3_5_fields(source) | {"experts": experts, "mlp_width": source["moe_intermediate_size"]}


def _qwen3_next_fields(source: Json) -> dict[str, Any]:
    require_experts_everywhere(source)
    return _qwen3_5_moe_fields(source)


def _qwen3_5_json(config: TransformerConfig) -> dict[str, Any]:
    delta = config.delta
    if delta is None:
        return {}
    return {
        "attention_bias": config.qkv_bias,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_width,
        "linear_value_head_dim": delta.value_width,
        "linear_conv_kernel_dim": delta.kernel,
        "layer_types": ["linear_attention" if recurrent else "full_attention" for recurrent in config.recurrent],
        "partial_rotary_factor": config.rope_fraction,
    }


def _qwen3_5_moe_json(config: TransformerConfig) -> dict[str, Any]:
    shared = None if config.experts is None else config.experts.shared_width
    return qwen_experts_json(config) | _qwen3_5_json(config) | {"shared_expert_intermediate_size": shared}


_DELTA = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_attention_heads": 16,
}
_EXPERTS = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}
HYBRID_FAMILIES: dict[str, Family] = {
    "Qwen3NextForCausalLM": Family(
        "qwen3_next",
        "Qwen3-Next: gated delta-net layers, every fourth one gated attention; experts, and one for every token",
        _qwen3_next_fields,
        _qwen3_5_moe_json,
        _DELTA
        | _EXPERTS
        | {"num_experts": 512, "num_experts_per_tok": 10, "decoder_sparse_step": 1, "intermediate_size": 5632},
        experts=True,
        rope=("partial_rotary_factor",),
    ),
    "Qwen3_5ForCausalLM": Family(
        "qwen3_5_text",
        "Qwen3.5: gated delta-net layers, every fourth one gated attention",
        _qwen3_5_fields,
        _qwen3_5_json,
        _DELTA | {"num_key_value_heads": 4, "intermediate_size": 12_288},
        rope=("partial_rotary_factor",),
    ),
    "Qwen3_5MoeForCausalLM": Family(
        "qwen3_5_moe_text",
        "Qwen3.5 with experts, and one for every token",
        _qwen3_5_moe_fields,
        _qwen3_5_moe_json,
        _DELTA | _EXPERTS | {"num_experts": 256, "num_experts_per_tok": 8, "intermediate_size": 512},
        experts=True,
        rope=("partial_rotary_factor",),
    ),
}
