"""The families whose blocks are mixtures of experts: the fields of their `config.json` beyond the common ones."""

from __future__ import annotations

import math
from typing import Any

from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.family import Family, Json, layer_types, llama_fields, refuse, windows
from jaxrl_llm.models.layer_kinds import LatentConfig
from jaxrl_llm.models.rope_fields import rope_json
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


def require_experts_everywhere(source: Json) -> None:
    """Raise ValueError if some blocks have no experts."""
    refuse(source, "mlp_only_layers", "blocks without experts between others")
    if source["decoder_sparse_step"] != 1:
        raise ValueError(
            f"config.json has decoder_sparse_step {source['decoder_sparse_step']}: blocks without experts between "
            "others are not supported; only 1 is"
        )


def qwen_experts(source: Json, **own: Any) -> ExpertsConfig:
    """Experts as all Qwen models write them, with further fields `own`."""
    count = source.get("num_local_experts") or source["num_experts"]
    return ExpertsConfig(count, source["num_experts_per_tok"], bool(source["norm_topk_prob"]), **own)


def qwen_experts_json(config: TransformerConfig) -> dict[str, Any]:
    """The reverse of `qwen_experts`."""
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
    require_experts_everywhere(source)
    local = windows(source, lambda layer: True) if source.get("use_sliding_window") else {}
    own = {"qk_norm": True, "experts": qwen_experts(source), "mlp_width": source["moe_intermediate_size"]}
    return llama_fields(source) | {"mlp_bias": False} | own | local


def _qwen3_moe_json(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias} | qwen_experts_json(config)


def _qwen2_moe_fields(source: Json) -> dict[str, Any]:
    require_experts_everywhere(source)
    below = source["max_window_layers"]
    local = windows(source, lambda layer: layer % 2 == 0 and layer < below) if source.get("use_sliding_window") else {}
    shared = {"shared_width": source["shared_expert_intermediate_size"], "shared_gate": True}
    return {
        "qk_norm": False,
        "qkv_bias": bool(source["qkv_bias"]),
        "experts": qwen_experts(source, **shared),
        "mlp_width": source["moe_intermediate_size"],
    } | local


def _qwen2_moe_json(config: TransformerConfig) -> dict[str, Any]:
    own = {"qkv_bias": config.qkv_bias, "shared_expert_intermediate_size": _experts(config).shared_width}
    return qwen_experts_json(config) | own | {"layer_types": layer_types(config)}


def _gpt_oss_fields(source: Json) -> dict[str, Any]:
    if source["swiglu_alpha"] != _SWIGLU_ALPHA:
        raise ValueError(f"config.json has swiglu_alpha {source['swiglu_alpha']}; only {_SWIGLU_ALPHA} is supported")
    experts = ExpertsConfig(source["num_local_experts"], source["num_experts_per_tok"], router_bias=True)
    own = {
        "mlp_bias": True,
        "activation": "clamped_swiglu",
        "activation_limit": float(source["swiglu_limit"]),
        "attention_sinks": True,
        "experts": experts,
    }
    return llama_fields(source) | own | windows(source, lambda layer: layer % 2 == 0)


def _gpt_oss_json(config: TransformerConfig) -> dict[str, Any]:
    experts = _experts(config)
    return {
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "swiglu_limit": config.activation_limit,
        "sliding_window": config.window or 128,
        "layer_types": layer_types(config),
        # Without it the stretched positions of the published models would be meant.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }


def _deepseek_experts(source: Json) -> dict[str, Any]:
    """Sigmoid scores, a bias for the choice, groups, shared experts, and first layers without."""
    dense = source["first_k_dense_replace"]
    experts = ExpertsConfig(
        count=source["n_routed_experts"],
        per_token=source["num_experts_per_tok"],
        normalise=bool(source["norm_topk_prob"]),
        scores="sigmoid",
        selection_bias=True,
        groups=source["n_group"],
        groups_per_token=source["topk_group"],
        scale=float(source["routed_scaling_factor"]),
        shared_width=source["moe_intermediate_size"] * source["n_shared_experts"],
        dense_layers=dense,
        dense_width=source["intermediate_size"] if dense else None,
    )
    return {"experts": experts, "mlp_width": source["moe_intermediate_size"], "mlp_bias": False}


def _deepseek_experts_json(config: TransformerConfig) -> dict[str, Any]:
    experts = _experts(config)
    return {
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.normalise,
        "n_group": experts.groups,
        "topk_group": experts.groups_per_token,
        "routed_scaling_factor": experts.scale,
        "n_shared_experts": (experts.shared_width or 0) // config.mlp_size,
        "moe_intermediate_size": config.mlp_size,
        "intermediate_size": experts.dense_width or config.mlp_size,
        "first_k_dense_replace": experts.dense_layers,
        "num_nextn_predict_layers": 0,
    }


def _glm4_moe_fields(source: Json) -> dict[str, Any]:
    own = {"qk_norm": bool(source["use_qk_norm"]), "attention_out_bias": False}
    return llama_fields(source) | _deepseek_experts(source) | own


def _glm4_moe_json(config: TransformerConfig) -> dict[str, Any]:
    own = {"use_qk_norm": config.qk_norm, "partial_rotary_factor": config.rope_fraction}
    return {"attention_bias": config.qkv_bias} | _deepseek_experts_json(config) | own


def _deepseek_v3_fields(source: Json) -> dict[str, Any]:
    refuse(source, "attention_bias", "biases of latent attention")
    latent = LatentConfig(
        rank=source["kv_lora_rank"],
        rope_width=source["qk_rope_head_dim"],
        plain_width=source["qk_nope_head_dim"],
        value_width=source["v_head_dim"],
        query_rank=source.get("q_lora_rank"),
    )
    heads = source["num_attention_heads"]
    scale = (latent.plain_width + latent.rope_width) ** -0.5
    written = source.get("rope_scaling") or source.get("rope_parameters") or {}
    if (written.get("rope_type") or written.get("type") or "default") != "default" and written.get("mscale_all_dim"):
        # The scores are stretched with the positions, and not cosine and sine alone.
        scale *= (0.1 * written["mscale_all_dim"] * math.log(max(written["factor"], 1.0)) + 1.0) ** 2
    own = {
        "qk_norm": False,
        "latent": latent,
        "kv_heads": heads,
        "head_width": latent.rope_width,
        "query_scale": scale,
        "rope_interleaved": bool(source["rope_interleave"]),
    }
    return own | _deepseek_experts(source)


def _deepseek_v3_json(config: TransformerConfig) -> dict[str, Any]:
    latent = config.latent
    if latent is None:
        return {}
    plain = (latent.plain_width + latent.rope_width) ** -0.5
    stretched = {}
    if config.rope_scaling is not None and config.score_scale != plain:
        # One number says how scores are stretched, the other one by how much less cosine and sine are.
        scaling = config.rope_scaling
        grown = ((config.score_scale / plain) ** 0.5 - 1.0) / (0.1 * math.log(scaling.factor))
        written = dict(rope_json(config)["rope_scaling"])
        stretched = {"rope_scaling": written | {"mscale_all_dim": grown, "attention_factor": scaling.amplitude}}
    return (
        _deepseek_experts_json(config)
        | stretched
        | {
            "kv_lora_rank": latent.rank,
            "q_lora_rank": latent.query_rank,
            "qk_rope_head_dim": latent.rope_width,
            "qk_nope_head_dim": latent.plain_width,
            "v_head_dim": latent.value_width,
            "rope_interleave": config.rope_interleaved,
        }
    )


_SWIGLU_ALPHA = 1.702
_DEEPSEEK = {
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
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
    "GptOssForCausalLM": Family(
        "gpt_oss",
        "gpt-oss: attention sinks, biases of experts and router, clamped SwiGLU; MXFP4 weights are read",
        _gpt_oss_fields,
        _gpt_oss_json,
        {
            "rms_norm_eps": 1e-5,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": _SWIGLU_ALPHA,
            "swiglu_limit": 7.0,
            "sliding_window": 128,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        experts=True,
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        "GLM-4.5 and 4.6: sigmoid router with a bias, shared experts, first layers without experts",
        _glm4_moe_fields,
        _glm4_moe_json,
        _DEEPSEEK
        | {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "use_qk_norm": False,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        experts=True,
        rope=("partial_rotary_factor",),
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        "DeepSeek-V3 and R1, Moonlight: latent attention with its narrow cache, groups of experts; weights in fp8 are "
        "read",
        _deepseek_v3_fields,
        _deepseek_v3_json,
        _DEEPSEEK
        | {
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "rope_interleave": True,
            "max_position_embeddings": 4096,
        },
        experts=True,
    ),
}
