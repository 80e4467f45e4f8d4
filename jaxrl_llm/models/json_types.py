"""Types of the fields of `config.json`, checked before the fields are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxrl_llm.bounds import shown

MOST_LAYERS = 2000
_LARGEST = 2**40


class _Kind(NamedTuple):
    meaning: str
    holds: Callable[[Any], bool]


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= MOST_LAYERS and all(map(holds, value))


_COUNT = _Kind("an integer of at least 1", lambda value: _integer(value, 1))
_NATURAL = _Kind("an integer of at least 0", lambda value: _integer(value, 0))
_LAYERS = _Kind(f"an integer from 1 to {MOST_LAYERS}", lambda value: _integer(value, 1) and value <= MOST_LAYERS)
_POSITIVE = _Kind("a number above 0", lambda value: _number(value) and value > 0)
_FINITE = _Kind("a finite number", lambda value: _number(value) and math.isfinite(value))
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("text", lambda value: isinstance(value, str))
_TEXTS = _Kind(f"a list of at most {MOST_LAYERS} texts", _list_of(_TEXT.holds))
_NUMBERS = _Kind(f"a list of at most {MOST_LAYERS} numbers", _list_of(_number))
_SWITCHES = _Kind(f"a list of at most {MOST_LAYERS} integers", _list_of(lambda value: value in (0, 1)))
_OBJECT = _Kind("an object", lambda value: isinstance(value, Mapping))
_KINDS: dict[_Kind, str] = {
    _COUNT: "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size "
    "max_position_embeddings original_max_position_embeddings num_local_experts num_experts num_experts_per_tok "
    "n_routed_experts n_group topk_group kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "moe_intermediate_size no_rope_layer_interval sliding_window_pattern _sliding_window_pattern decoder_sparse_step",
    _NATURAL: "sliding_window max_window_layers first_k_dense_replace n_shared_experts num_nextn_predict_layers "
    "shared_expert_intermediate_size",
    _LAYERS: "num_hidden_layers",
    _POSITIVE: "rms_norm_eps rope_theta rope_local_base_freq query_pre_attn_scalar factor low_freq_factor "
    "high_freq_factor partial_rotary_factor swiglu_limit routed_scaling_factor logits_scaling",
    _FINITE: "attn_logit_softcapping final_logit_softcapping attention_factor attention_multiplier "
    "embedding_multiplier residual_multiplier beta_fast beta_slow mscale mscale_all_dim llama_4_scaling_beta "
    "swiglu_alpha",
    _FLAG: "tie_word_embeddings attention_bias attention_out_bias mlp_bias qkv_bias norm_topk_prob rope_interleave "
    "use_sliding_window use_qk_norm",
    _TEXT: "model_type hidden_act hidden_activation dtype torch_dtype rope_type type",
    _TEXTS: "architectures layer_types",
    _NUMBERS: "short_factor long_factor",
    _SWITCHES: "no_rope_layers",
    _OBJECT: "rope_scaling rope_parameters full_attention sliding_attention quantization_config text_config",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def require_types(source: Mapping[str, Any], inside: str = "") -> None:
    """Refuse a `config.json` with a field of a wrong type; null is allowed, and nested objects are checked.

    Raises:
      ValueError: naming the field, its value, and what it must be.
    """
    for name, kind in _KIND_OF.items():
        if (value := source.get(name)) is None:
            continue
        if not kind.holds(value):
            raise ValueError(
                f"config.json has {inside}{name} {shown(value)}; it must be {kind.meaning}; copy the file of the model "
                "again"
            )
        if isinstance(value, Mapping):
            require_types(value, f"{inside}{name}.")
