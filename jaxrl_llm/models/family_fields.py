"""What each open family's `config.json` says beyond the common fields: a table of pairs of small functions.

A family is a row: its architecture, what it leaves unsaid in `config.json`, and how its own fields are read and
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.transformer_config import TransformerConfig

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one architecture writes its config.

    Attributes:
      model_type: its name in `config.json`.
      fields: config.json -> the fields of `TransformerConfig` that are the family's own.
      json: the reverse.
      defaults: what a missing key of `config.json` means.
      experts: its blocks are mixtures of experts.
    """

    model_type: str
    fields: Callable[[Json], dict[str, Any]]
    json: Callable[[TransformerConfig], dict[str, Any]]
    defaults: Json
    experts: bool = False


def refuse(source: Json, key: str, meaning: str) -> None:
    """Raise ValueError where config.json switches on something that the decoder does not have."""
    if source.get(key):
        raise ValueError(
            f"config.json has {key} {source[key]!r}: {meaning} are not supported; use a checkpoint without"
        )


def _experts(config: TransformerConfig) -> ExpertsConfig:
    assert config.experts is not None
    return config.experts


def _windows(source: Json, pattern: Callable[[int], bool]) -> dict[str, Any]:
    """Fields of windowed layers: from `layer_types`, else from the family's pattern."""
    window, layers = source.get("sliding_window"), source["num_hidden_layers"]
    kinds = source.get("layer_types") or [
        "sliding_attention" if pattern(layer) else "full_attention" for layer in range(layers)
    ]
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(
                f"config.json has layer_types with {kind!r}; only sliding_attention and full_attention are supported"
            )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if window is None or not any(windowed):
        return {}
    periods = (n for n in range(1, layers + 1) if all(windowed[i] == windowed[i % n] for i in range(layers)))
    return {"window": window, "window_pattern": windowed[: next(periods)]}


def _layer_types(config: TransformerConfig) -> list[str]:
    return ["sliding_attention" if local else "full_attention" for local in config.windowed]


def _llama_fields(source: Json) -> dict[str, Any]:
    refuse(source, "mlp_bias", "biases in the MLP")
    biased = bool(source.get("attention_bias"))
    return {"qk_norm": False, "qkv_bias": biased, "attention_out_bias": biased}


def _llama_json(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": False}


def _mistral_fields(source: Json) -> dict[str, Any]:
    return {"qk_norm": False} | _windows(source, lambda layer: True)


def _mistral_json(config: TransformerConfig) -> dict[str, Any]:
    return {"sliding_window": config.window}


def _qwen_windows(source: Json) -> dict[str, Any]:
    if not source.get("use_sliding_window"):
        return {}
    return _windows(source, lambda layer: layer >= source.get("max_window_layers", 0))


def _qwen_windows_json(config: TransformerConfig) -> dict[str, Any]:
    if config.window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": config.window, "layer_types": _layer_types(config)}


def _qwen2_fields(source: Json) -> dict[str, Any]:
    return {"qk_norm": False, "qkv_bias": True} | _qwen_windows(source)


def _qwen3_fields(source: Json) -> dict[str, Any]:
    biased = bool(source.get("attention_bias"))
    return {"qk_norm": True, "qkv_bias": biased, "attention_out_bias": biased} | _qwen_windows(source)


def _qwen3_json(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias} | _qwen_windows_json(config)


def _gemma_fields(source: Json) -> dict[str, Any]:
    refuse(source, "use_bidirectional_attention", "attention to later tokens")
    biased = bool(source.get("attention_bias"))
    return {
        "qkv_bias": biased,
        "attention_out_bias": biased,
        "query_scale": source["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": source.get("attn_logit_softcapping"),
        "logits_cap": source.get("final_logit_softcapping"),
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": source["hidden_size"] ** 0.5,
    }


def _gemma2_fields(source: Json) -> dict[str, Any]:
    return {"qk_norm": False} | _gemma_fields(source) | _windows(source, lambda layer: layer % 2 == 0)


def _gemma3_fields(source: Json) -> dict[str, Any]:
    period = source.get("sliding_window_pattern") or source.get("_sliding_window_pattern") or 6
    return {"qk_norm": True} | _gemma_fields(source) | _windows(source, lambda layer: (layer + 1) % period != 0)


def _gemma_json(config: TransformerConfig) -> dict[str, Any]:
    # Without a window the layers are all full, and the field must still hold a number.
    return {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logits_cap,
        "sliding_window": config.window or 4096,
        "layer_types": _layer_types(config),
    }


def _phi3_fields(source: Json) -> dict[str, Any]:
    written = source.get("rope_parameters") or source.get("rope_scaling") or {}
    kind = written.get("rope_type") or written.get("type") or "default"
    if kind != "default":
        raise ValueError(
            f"config.json of a phi3 has rope_scaling.rope_type {kind!r}: frequencies that depend on the length of the "
            "batch are not supported; use a checkpoint without (the short-context ones)"
        )
    return {"qk_norm": False, "rope_fraction": _rope_fraction(source)} | _windows(source, lambda layer: True)


def _rope_fraction(source: Json) -> float:
    nested = source.get("rope_parameters") or {}
    return float(nested.get("partial_rotary_factor", source.get("partial_rotary_factor", 1.0)))


def _phi3_json(config: TransformerConfig) -> dict[str, Any]:
    # Its own default of the padding token may lie outside a small vocabulary.
    return {"sliding_window": config.window, "partial_rotary_factor": config.rope_fraction, "pad_token_id": None}


def _mixtral_fields(source: Json) -> dict[str, Any]:
    experts = ExpertsConfig(count=source["num_local_experts"], per_token=source["num_experts_per_tok"])
    return {"qk_norm": False, "experts": experts} | _windows(source, lambda layer: True)


def _mixtral_json(config: TransformerConfig) -> dict[str, Any]:
    experts = _experts(config)
    return {
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "sliding_window": config.window,
    }


def _qwen3_moe_fields(source: Json) -> dict[str, Any]:
    refuse(source, "mlp_only_layers", "blocks without experts")
    if source.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"config.json has decoder_sparse_step {source['decoder_sparse_step']}: blocks without experts are not "
            "supported; only 1 is"
        )
    count = source["num_experts"] if "num_experts" in source else source["num_local_experts"]
    experts = ExpertsConfig(count, source["num_experts_per_tok"], bool(source.get("norm_topk_prob")))
    windows = _windows(source, lambda layer: True) if source.get("use_sliding_window") else {}
    biased = bool(source.get("attention_bias"))
    return {
        "qk_norm": True,
        "qkv_bias": biased,
        "attention_out_bias": biased,
        "experts": experts,
        "mlp_width": source["moe_intermediate_size"],
    } | windows


def _qwen3_moe_json(config: TransformerConfig) -> dict[str, Any]:
    experts = _experts(config)
    return {
        "attention_bias": config.qkv_bias,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.normalise,
        "moe_intermediate_size": config.mlp_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN = {"max_window_layers": 28, "sliding_window": 4096}
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _llama_fields, _llama_json, {}),
    "Qwen2ForCausalLM": Family(
        "qwen2", _qwen2_fields, _qwen_windows_json, {"max_window_layers": 28, "sliding_window": 4096}
    ),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3_fields, _qwen3_json, _QWEN | {"head_dim": 128}),
    "MistralForCausalLM": Family("mistral", _mistral_fields, _mistral_json, {"sliding_window": 4096}),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _gemma2_fields,
        _gemma_json,
        _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _gemma3_fields,
        _gemma_json,
        _GEMMA | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    ),
    "Phi3ForCausalLM": Family("phi3", _phi3_fields, _phi3_json, {"rms_norm_eps": 1e-5}),
    "MixtralForCausalLM": Family(
        "mixtral", _mixtral_fields, _mixtral_json, {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0}, experts=True
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", _qwen3_moe_fields, _qwen3_moe_json, {"sliding_window": 4096}, experts=True
    ),
}
