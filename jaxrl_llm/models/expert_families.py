"""The families whose blocks are mixtures of experts: what their `config.json` says beyond the common fields."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.family import Family, Json, layer_types, llama_fields, refuse, windows
from jaxrl_llm.models.transformer_config import TransformerConfig


def _experts(config: TransformerConfig) -> ExpertsConfig:
    assert config.experts is not None
    return config.experts


def _mixtral_fields(source: Json) -> dict[str, Any]:
    experts = ExpertsConfig(count=source["num_local_experts"], per_token=source["num_experts_per_tok"])
    return {"qk_norm": False, "experts": experts} | windows(source, lambda layer: True)


def _mixtral_json(config: TransformerConfig) -> dict[str, Any]:
    experts = _experts(config)
    return {
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "sliding_window": config.window,
    }


def _require_experts_everywhere(source: Json) -> None:
    refuse(source, "mlp_only_layers", "blocks without experts between others")
    if source["decoder_sparse_step"] != 1:
        raise ValueError(
            f"config.json has decoder_sparse_step {source['decoder_sparse_step']}: blocks without experts between "
            "others are not supported; only 1 is"
        )


def _qwen_experts(source: Json, **own: Any) -> ExpertsConfig:
    count = source.get("num_local_experts") or source["num_experts"]
    return ExpertsConfig(count, source["num_experts_per_tok"], bool(source["norm_topk_prob"]), **own)


def _qwen_experts_json(config: TransformerConfig) -> dict[str, Any]:
    experts = _experts(config)
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.normalise,
        "moe_intermediate_size": config.mlp_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


def _qwen3_moe_fields(source: Json) -> dict[str, Any]:
    _require_experts_everywhere(source)
    local = windows(source, lambda layer: True) if source.get("use_sliding_window") else {}
    own = {"qk_norm": True, "experts": _qwen_experts(source), "mlp_width": source["moe_intermediate_size"]}
    return llama_fields(source) | {"mlp_bias": False} | own | local


def _qwen3_moe_json(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias} | _qwen_experts_json(config)


def _qwen2_moe_fields(source: Json) -> dict[str, Any]:
    _require_experts_everywhere(source)
    below = source["max_window_layers"]
    local = windows(source, lambda layer: layer % 2 == 0 and layer < below) if source.get("use_sliding_window") else {}
    shared = {"shared_width": source["shared_expert_intermediate_size"], "shared_gate": True}
    return {
        "qk_norm": False,
        "qkv_bias": bool(source["qkv_bias"]),
        "experts": _qwen_experts(source, **shared),
        "mlp_width": source["moe_intermediate_size"],
    } | local


def _qwen2_moe_json(config: TransformerConfig) -> dict[str, Any]:
    own = {"qkv_bias": config.qkv_bias, "shared_expert_intermediate_size": _experts(config).shared_width}
    return _qwen_experts_json(config) | own | {"layer_types": layer_types(config)}


EXPERT_FAMILIES: dict[str, Family] = {
    "MixtralForCausalLM": Family(
        "mixtral",
        "Mixtral",
        _mixtral_fields,
        _mixtral_json,
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        experts=True,
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-MoE: an expert that serves every token, behind a gate",
        _qwen2_moe_fields,
        _qwen2_moe_json,
        {
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "decoder_sparse_step": 1,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        experts=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        "Qwen3 with experts",
        _qwen3_moe_fields,
        _qwen3_moe_json,
        {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "sliding_window": 4096,
        },
        experts=True,
    ),
}
