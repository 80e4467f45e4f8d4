"""The families whose blocks have one MLP: the fields of their `config.json` beyond the common ones."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.family import (
    Family,
    Json,
    layer_types,
    llama_fields,
    llama_json,
    refuse,
    shortest_pattern,
    windows,
)
from jaxrl_llm.models.rope_fields import rope_json
from jaxrl_llm.models.transformer_config import TransformerConfig


def _mistral_fields(source: Json) -> dict[str, Any]:
    return {"qk_norm": False} | windows(source, lambda layer: True)


def _mistral_json(config: TransformerConfig) -> dict[str, Any]:
    return {"sliding_window": config.window}


def _qwen_windows(source: Json) -> dict[str, Any]:
    if not source.get("use_sliding_window"):
        return {}
    return windows(source, lambda layer: layer >= source.get("max_window_layers", 0))


def _qwen_windows_json(config: TransformerConfig) -> dict[str, Any]:
    if config.window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": config.window, "layer_types": layer_types(config)}


def _qwen2_fields(source: Json) -> dict[str, Any]:
    return {"qk_norm": False, "qkv_bias": True} | _qwen_windows(source)


def _qwen3_fields(source: Json) -> dict[str, Any]:
    biased = bool(source.get("attention_bias"))
    return {"qk_norm": True, "qkv_bias": biased, "attention_out_bias": biased} | _qwen_windows(source)


def _qwen3_json(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias} | _qwen_windows_json(config)


def _gemma_fields(source: Json) -> dict[str, Any]:
    refuse(source, "use_bidirectional_attention", "attention to later tokens")
    return llama_fields(source) | {"norm_offset": 1.0, "embedding_scale": source["hidden_size"] ** 0.5}


def _gemma1_fields(source: Json) -> dict[str, Any]:
    # The first files say gelu, and mean its approximation.
    plain = {"activation": "gelu_tanh"} if source["hidden_act"] == "gelu" else {}
    return _gemma_fields(source) | plain


def _gemma2_fields(source: Json) -> dict[str, Any]:
    return (
        _gemma_fields(source)
        | {
            "query_scale": source["query_pre_attn_scalar"] ** -0.5,
            "attention_cap": source.get("attn_logit_softcapping"),
            "logits_cap": source.get("final_logit_softcapping"),
            "post_norms": True,
        }
        | windows(source, lambda layer: layer % 2 == 0)
    )


def _gemma3_fields(source: Json) -> dict[str, Any]:
    period = source.get("sliding_window_pattern") or source.get("_sliding_window_pattern") or 6
    # transformers reads a soft cap of the attention, and does not apply it.
    own = {"qk_norm": True, "attention_cap": None}
    return _gemma2_fields(source) | own | windows(source, lambda layer: (layer + 1) % period != 0)


def _gemma2_json(config: TransformerConfig) -> dict[str, Any]:
    # Without a window the layers are all full, and the field must still hold a number.
    return {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logits_cap,
        "sliding_window": config.window or 4096,
        "layer_types": layer_types(config),
    }


def _phi3_fields(source: Json) -> dict[str, Any]:
    return {"qk_norm": False} | windows(source, lambda layer: True)


def _phi3_json(config: TransformerConfig) -> dict[str, Any]:
    # Its own default of the padding token may lie outside a small vocabulary.
    written: dict[str, Any] = {"sliding_window": config.window, "pad_token_id": None}
    scaling = config.rope_scaling
    return written if scaling is None else written | {"original_max_position_embeddings": scaling.original_positions}


def _seed_oss_fields(source: Json) -> dict[str, Any]:
    return llama_fields(source) | {"attention_out_bias": bool(source.get("attention_out_bias"))}


def _seed_oss_json(config: TransformerConfig) -> dict[str, Any]:
    return llama_json(config) | {"attention_out_bias": config.attention_out_bias}


def _smollm3_fields(source: Json) -> dict[str, Any]:
    layers, interval = source["num_hidden_layers"], source["no_rope_layer_interval"]
    rotated = source.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    rotated = tuple(bool(one) for one in rotated[:layers])
    local = windows(source, lambda layer: not rotated[layer]) if source.get("use_sliding_window") else {}
    return llama_fields(source) | {"rope_pattern": shortest_pattern(rotated)} | local


def _smollm3_json(config: TransformerConfig) -> dict[str, Any]:
    own = {"no_rope_layers": [int(rotated) for rotated in config.rotated], "pad_token_id": None}
    return llama_json(config) | _qwen_windows_json(config) | own


def _granite_fields(source: Json) -> dict[str, Any]:
    return llama_fields(source) | {
        "embedding_scale": float(source["embedding_multiplier"]),
        "residual_scale": float(source["residual_multiplier"]),
        "query_scale": float(source["attention_multiplier"]),
        "logits_divisor": float(source["logits_scaling"]),
    }


def _granite_json(config: TransformerConfig) -> dict[str, Any]:
    return llama_json(config) | {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.score_scale,
        "logits_scaling": config.logits_divisor,
    }


def _olmo2_fields(source: Json) -> dict[str, Any]:
    own = {"qk_norm": True, "qk_norm_span": "all_heads", "pre_norms": False, "post_norms": True, "mlp_bias": False}
    return llama_fields(source) | own


def _olmo2_json(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "pad_token_id": None, "eos_token_id": None}


def _olmo3_fields(source: Json) -> dict[str, Any]:
    fields = _olmo2_fields(source) | windows(source, lambda layer: (layer + 1) % 4 != 0)
    nested = (source.get("rope_parameters") or {}).get("sliding_attention")
    # Windowed layers are not stretched; in the old writing their base is the default, whatever that of the others.
    return fields | ({"local_rope_base": _OLMO3_BASE} if "window" in fields and not nested else {})


def _olmo3_json(config: TransformerConfig) -> dict[str, Any]:
    written = rope_json(config)
    full = {"rope_type": "default", **written.get("rope_scaling", {}), "rope_theta": config.rope_base}
    local = {"rope_type": "default", "rope_theta": config.local_rope_base or config.rope_base}
    return _olmo2_json(config) | {
        "sliding_window": config.window,
        "layer_types": layer_types(config),
        "rope_scaling": None,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def _glm4_fields(source: Json) -> dict[str, Any]:
    return llama_fields(source) | {
        "attention_out_bias": False,
        "mlp_bias": False,
        "post_norms": True,
        "rope_interleaved": True,
    }


def _glm4_json(config: TransformerConfig) -> dict[str, Any]:
    # Its own special tokens lie outside a small vocabulary; and it is never said that all dimensions are rotated.
    own = {"pad_token_id": None, "eos_token_id": [0], "partial_rotary_factor": config.rope_fraction}
    return {"attention_bias": config.qkv_bias} | own


_OLMO3_BASE = 500_000.0
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
}
_GEMMA2 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "num_key_value_heads": 4,
}
_QWEN = {"max_window_layers": 28, "sliding_window": 4096, "num_key_value_heads": 32}
DENSE_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama", "Llama 2 and 3.x, and what is built like them; tied or untied head", llama_fields, llama_json, {}
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        "Qwen2, Qwen2.5: biases on queries, keys and values; windows in the upper layers",
        _qwen2_fields,
        _qwen_windows_json,
        _QWEN,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", "Qwen3: norms on queries and keys", _qwen3_fields, _qwen3_json, _QWEN | {"head_dim": 128}
    ),
    "MistralForCausalLM": Family(
        "mistral",
        "Mistral: sliding window",
        _mistral_fields,
        _mistral_json,
        {"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "Ministral3ForCausalLM": Family(
        "ministral3",
        "Ministral 3: YaRN, and queries that grow with their position",
        _mistral_fields,
        _mistral_json,
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        rope=("llama_4_scaling_beta",),
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        "Gemma 1: gains that are stored as their difference from one",
        _gemma1_fields,
        llama_json,
        _GEMMA | {"num_key_value_heads": 16},
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        "Gemma 2: norms before and after, soft caps, local and global layers",
        _gemma2_fields,
        _gemma2_json,
        _GEMMA | _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        "Gemma 3: norms before and after, and on queries and keys; local and global layers with two rope bases",
        _gemma3_fields,
        _gemma2_json,
        _GEMMA
        | _GEMMA2
        | {
            # Published files leave most of their sizes out.
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        "Phi-3 and Phi-4: partly rotated heads, longrope",
        _phi3_fields,
        _phi3_json,
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        rope=("partial_rotary_factor",),
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        "Seed-OSS: biases on queries, keys and values",
        _seed_oss_fields,
        _seed_oss_json,
        {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        "SmolLM3: every fourth layer without rotary positions",
        _smollm3_fields,
        _smollm3_json,
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "rope_theta": 2_000_000.0,
        },
    ),
    "GraniteForCausalLM": Family(
        "granite",
        "Granite 3: factors on embeddings, residuals, attention and scores",
        _granite_fields,
        _granite_json,
        {f"{name}_multiplier": 1.0 for name in ("embedding", "residual", "attention")} | {"logits_scaling": 1.0},
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        "OLMo 2: norms after attention and MLP alone, and over all heads of queries and keys",
        _olmo2_fields,
        _olmo2_json,
        {"rms_norm_eps": 1e-5},
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        "OLMo 3: the same with windows in three layers of four",
        _olmo3_fields,
        _olmo3_json,
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": _OLMO3_BASE},
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        "GLM-4 (0414): norms before and after, partly rotated heads in pairs of neighbours",
        _glm4_fields,
        _glm4_json,
        {
            "rms_norm_eps": 1.5625e-7,
            "attention_bias": True,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "partial_rotary_factor": 0.5,
        },
        rope=("partial_rotary_factor",),
    ),
}
