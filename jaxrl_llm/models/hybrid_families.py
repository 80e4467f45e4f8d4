"""The families whose layers are of several kinds: the fields of their `config.json` beyond the common ones."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.expert_families import qwen_experts, qwen_experts_json, require_experts_everywhere
from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.family import Family, Json, layer_types, llama_fields, refuse, shortest_pattern, windows
from jaxrl_llm.models.layer_kinds import DeltaConfig, GlobalConfig, PerLayerConfig
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


def _gemma4_fields(source: Json) -> dict[str, Any]:
    if source.get("use_bidirectional_attention") != "vision":  # which says nothing of text
        refuse(source, "use_bidirectional_attention", "attention to later tokens")
    experts = _gemma4_experts(source)
    layers = source["num_hidden_layers"]
    kinds = list(source.get("layer_types") or ["sliding_attention"] * layers)
    if not source.get("layer_types"):
        kinds = ["full_attention" if (layer + 1) % 6 == 0 else kind for layer, kind in enumerate(kinds)]
    kinds[-1] = "full_attention"
    wide = _gemma4_global(source, kinds)
    reading = source.get("num_kv_shared_layers") or 0
    double = source.get("use_double_wide_mlp") and reading
    per_layer = source.get("hidden_size_per_layer_input")
    return (
        llama_fields(source)
        | {
            "qk_norm": True,
            "value_norm": True,
            "query_scale": 1.0,
            "logits_cap": source.get("final_logit_softcapping"),
            "post_norms": True,
            "embedding_scale": source["hidden_size"] ** 0.5,
            "layer_scales": True,
            "mlp_bias": False,
            "experts": experts,
            "mlp_width": source["intermediate_size"] if experts is None else source["moe_intermediate_size"],
            "global_heads": wide,
            "reading_layers": reading,
            "reading_mlp_width": 2 * source["intermediate_size"] if double else None,
            "per_layer": PerLayerConfig(per_layer, source["vocab_size_per_layer_input"]) if per_layer else None,
        }
        | windows({**source, "layer_types": kinds}, lambda layer: False)
    )


def _gemma4_experts(source: Json) -> ExpertsConfig | None:
    """Experts beside the MLP; every token uses the MLP."""
    if not source.get("enable_moe_block"):
        return None
    if source.get("use_double_wide_mlp") and source.get("num_kv_shared_layers"):
        raise ValueError("config.json has enable_moe_block and use_double_wide_mlp; one of them is supported at a time")
    return ExpertsConfig(
        source["num_experts"],
        source["top_k_experts"],
        shared_width=source["intermediate_size"],
        own_norms=True,
    )


def _gemma4_global(source: Json, kinds: list[str]) -> GlobalConfig:
    """Heads of layers without a window, in the writing of published files or in that with an entry for each layer."""
    alike = bool(source.get("attention_k_eq_v"))
    heads = (source.get("num_global_key_value_heads") if alike else None) or source["num_key_value_heads"]
    written = source.get("per_layer_config")
    if written is None:
        return GlobalConfig(source["global_head_dim"], heads, alike)
    full = [dict(written.get(str(layer), {})) for layer, kind in enumerate(kinds) if kind == "full_attention"]
    others = {layer: own for layer, own in written.items() if kinds[int(layer)] != "full_attention" and own}
    if others or any(own != full[0] for own in full) or set(full[0]) - {"head_dim", "num_key_value_heads"}:
        raise ValueError(
            f"config.json has per_layer_config {dict(written)}; supported are head_dim and num_key_value_heads, the "
            "same in all layers of full_attention"
        )
    size, heads = full[0].get("head_dim"), full[0].get("num_key_value_heads")
    return GlobalConfig(size or source["head_dim"], heads or source["num_key_value_heads"], alike)


def _gemma4_json(config: TransformerConfig) -> dict[str, Any]:
    wide, per_layer, experts = config.global_heads, config.per_layer, config.experts
    if wide is None or config.rope_scaling is None:
        return {}
    mixture: dict[str, Any] = {"enable_moe_block": experts is not None}
    if experts is not None:
        mixture |= {"num_experts": experts.count, "top_k_experts": experts.per_token}
        mixture |= {"moe_intermediate_size": config.mlp_size, "intermediate_size": experts.shared_width}
    return mixture | {
        "attention_bias": config.qkv_bias,
        "final_logit_softcapping": config.logits_cap,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
        "global_head_dim": wide.head_width,
        "num_global_key_value_heads": wide.kv_heads if wide.values_are_keys else None,
        "attention_k_eq_v": wide.values_are_keys,
        "num_kv_shared_layers": config.reading_layers,
        "use_double_wide_mlp": config.reading_mlp_width is not None,
        "hidden_size_per_layer_input": 0 if per_layer is None else per_layer.width,
        "vocab_size_per_layer_input": config.vocabulary_size if per_layer is None else per_layer.vocabulary_size,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": config.rope_scaling.turning,
                "factor": config.rope_scaling.factor,
                "rope_theta": config.rope_base,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_base or config.rope_base},
        },
    }


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
    "Gemma4ForCausalLM": Family(
        "gemma4_text",
        "Gemma 4: embeddings for every layer, layers that share keys and values, wider global heads, values that are "
        "keys, experts beside the MLP",
        _gemma4_fields,
        _gemma4_json,
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "vocab_size": 262_144,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 30,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 512,
            "vocab_size_per_layer_input": 262_144,
            "hidden_size_per_layer_input": 256,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1_000_000.0,
                },
            },
        },
        experts=None,
    ),
}
