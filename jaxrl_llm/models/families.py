"""Open model families: `config.json` of a Hugging Face checkpoint <-> `TransformerConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from jaxrl_llm.bounds import shown
from jaxrl_llm.models.dense_families import DENSE_FAMILIES
from jaxrl_llm.models.expert_families import EXPERT_FAMILIES
from jaxrl_llm.models.family import Family, Json
from jaxrl_llm.models.hybrid_families import HYBRID_FAMILIES
from jaxrl_llm.models.json_types import require_types
from jaxrl_llm.models.packed import packing_of
from jaxrl_llm.models.rope_fields import rope_fields, rope_json
from jaxrl_llm.models.transformer_config import Activation, TransformerConfig

FAMILIES: dict[str, Family] = DENSE_FAMILIES | EXPERT_FAMILIES | HYBRID_FAMILIES


@dataclass(frozen=True)
class TextPart:
    """The text part of a vision-language architecture.

    Attributes:
      text: architecture of the text part, by its `model_type`; the first one if that is missing.
      defaults: values of missing keys of `text_config` that differ from the defaults of the family.
    """

    text: dict[str, str]
    defaults: Json = field(default_factory=dict)


VISION_LANGUAGE: dict[str, TextPart] = {
    "Gemma3ForConditionalGeneration": TextPart({"gemma3_text": "Gemma3ForCausalLM"}),
    "Qwen2_5_VLForConditionalGeneration": TextPart(
        {"qwen2_5_vl_text": "Qwen2ForCausalLM"},
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_window_layers": 80, "rope_theta": 1_000_000.0},
    ),
    "Qwen3VLForConditionalGeneration": TextPart({"qwen3_vl_text": "Qwen3ForCausalLM"}, {"rope_theta": 500_000.0}),
    "Qwen3_5ForConditionalGeneration": TextPart({"qwen3_5_text": "Qwen3_5ForCausalLM"}),
    "Qwen3_5MoeForConditionalGeneration": TextPart({"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}),
    "Gemma4ForConditionalGeneration": TextPart({"gemma4_text": "Gemma4ForCausalLM"}),
    "Mistral3ForConditionalGeneration": TextPart(
        {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}
    ),
}
# Reward models: the class of transformers with a score head instead of a vocabulary -> family of its backbone.
REWARD_MODELS: dict[str, str] = {
    f"{name}ForSequenceClassification": f"{name.replace('Text', '')}ForCausalLM"
    for name in (
        *("Llama", "Qwen2", "Qwen3", "Mistral", "Ministral3", "Gemma", "Gemma2", "Gemma3Text", "Phi3", "SeedOss"),
        *("SmolLM3", "Olmo2", "Olmo3", "Glm4", "Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss", "DeepseekV3"),
        *("Qwen3Next", "Qwen3_5Text"),
    )
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
# Fields of execution: two configs that differ only in these describe the same model.
_EXECUTION = ("attention", "layer_loop", "parameter_dtype", "compute_dtype")
# The same, set by a run; not by the reader of a config.json.
_SET_BY_A_RUN = ("cache_dtype", "cache_layout", "remat")
_PRECISIONS = ("float32", "bfloat16")
# Fields in which null means "none", or "the value of another field".
_NULL = frozenset(
    {"sliding_window", "head_dim", "num_key_value_heads", "q_lora_rank", "rope_scaling", "rope_parameters"}
    | {"attn_logit_softcapping", "final_logit_softcapping", "hidden_activation", "layer_types", "max_window_layers"}
)


def architecture_of(source: Json) -> str:
    """The supported architecture that a `config.json` names.

    Raises:
      ValueError: for any other, listing the supported ones.
    """
    require_types(source)
    named = source.get("architectures") or []
    by_type = {family.model_type: architecture for architecture, family in FAMILIES.items()}
    found = [name for name in named if name in FAMILIES or name in VISION_LANGUAGE or name in REWARD_MODELS] or (
        [by_type[source["model_type"]]] if not named and source.get("model_type") in by_type else []
    )
    if not found:
        raise ValueError(
            f"config.json names the architecture {shown(', '.join(named) or source.get('model_type'))}, which is not "
            f"supported; supported are {', '.join([*FAMILIES, *VISION_LANGUAGE])}"
        )
    return found[0]


def is_vision_language(source: Json) -> bool:
    """Whether a `config.json` describes a vision-language checkpoint."""
    return architecture_of(source) in VISION_LANGUAGE


def is_reward_model(source: Json) -> bool:
    """Whether a `config.json` describes a reward model, which scores texts."""
    return architecture_of(source) in REWARD_MODELS


def as_reward_model(source: Json, pad_id: int | None) -> dict[str, Any]:
    """The `config.json` of a reward model with the backbone that a `config.json` describes.

    Args:
      source: of the backbone, or of a reward model already.
      pad_id: of padding, behind which the scored token is not looked for; None keeps what the file says.

    Raises:
      ValueError: for a family of which `transformers` has no such class.
    """
    architecture = architecture_of(source)
    by_family = {family: name for name, family in REWARD_MODELS.items()}
    named = architecture if architecture in REWARD_MODELS else by_family.get(architecture)
    if named is None:
        raise ValueError(
            f"transformers has no reward model (ForSequenceClassification) of {architecture}; it has those of "
            f"{', '.join(by_family)}"
        )
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    return {**source, "architectures": [named], **labels} | ({} if pad_id is None else {"pad_token_id": pad_id})


def text_part(source: Json) -> tuple[str, Json]:
    """(architecture, `config.json`) of what reads text: the file as it is, the part of a vision-language checkpoint,
    or the backbone of a reward model.

    Raises:
      ValueError: for an unknown architecture.
    """
    architecture = architecture_of(source)
    if architecture in REWARD_MODELS:  # which has an embedding and no scores of the vocabulary
        return REWARD_MODELS[architecture], {**source, "tie_word_embeddings": True}
    if architecture not in VISION_LANGUAGE:
        return architecture, source
    part = VISION_LANGUAGE[architecture]
    # The first files of Qwen2.5-VL have the fields of the text part outside.
    nested = source.get("text_config") or {key: value for key, value in source.items() if key != "model_type"}
    kind = nested.get("model_type") or next(iter(part.text))
    if kind not in part.text:
        raise ValueError(
            f"config.json of a {architecture} has text_config.model_type {kind!r}, which is not supported; supported "
            f"are {', '.join(part.text)}"
        )
    outside = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
    outer = {key: source[key] for key in outside if source.get(key) is not None}
    return part.text[kind], {**part.defaults, **nested, **outer}


def config_from_json(source: Json, *, context_tokens: int | None = None, **execution: Any) -> TransformerConfig:
    """The `TransformerConfig` that a `config.json` describes.

    Args:
      source: the file as a dict, of old (`rope_theta`, `torch_dtype`) or new (`rope_parameters`, `dtype`) writing. Of a
        vision-language checkpoint its text part is described.
      context_tokens: longest sequence that will be computed, on which rotary angles may depend (see
        `TransformerConfig.for_context`).
      execution: fields of how to compute: attention, layer_loop, parameter_dtype, compute_dtype. The data types are
        by default the file's where it is float32 or bfloat16, else float32.

    Raises:
      ValueError: for an unknown architecture, a missing field, or an option that the decoder does not have.
    """
    if unknown := sorted(set(execution) - set(_EXECUTION)):
        raise ValueError(
            f"{', '.join(unknown)} cannot be set for a model that is read from config.json; only "
            f"{', '.join(_EXECUTION)} can"
        )
    architecture, source = text_part(source)
    family = FAMILIES[architecture]
    source = _complete(source, family)
    packing_of(source, architecture)
    # Old and new checkpoints differ in the name of the activation; Gemma has both, of which the second counts.
    activation = source.get("hidden_activation") or source["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"config.json has the activation {activation!r}; supported are {', '.join(_ACTIVATIONS)}")
    stored = source.get("dtype") or source.get("torch_dtype")
    precision = stored if stored in _PRECISIONS else "float32"
    common = {
        "vocabulary_size": source["vocab_size"],
        "width": source["hidden_size"],
        "layers": source["num_hidden_layers"],
        "heads": source["num_attention_heads"],
        "kv_heads": source.get("num_key_value_heads") or source["num_attention_heads"],
        "head_width": source.get("head_dim") or source["hidden_size"] // source["num_attention_heads"],
        "mlp_width": source["intermediate_size"],
        "activation": _ACTIVATIONS[activation],
        "norm_epsilon": source["rms_norm_eps"],
        "tie_embeddings": bool(source["tie_word_embeddings"]),
        "parameter_dtype": precision,
        "compute_dtype": precision,
    }
    try:
        own = family.fields(source)
        rope = rope_fields(source, local="window" in own, read=family.rope)
        config = TransformerConfig(**(common | rope | own | execution))
    except KeyError as error:
        raise ValueError(
            f"config.json of a {family.model_type} lacks {error}; copy the file of the model again"
        ) from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"config.json of a {family.model_type} says something that is no model ({error}); copy the file of the "
            "model again"
        ) from None
    return config if context_tokens is None else config.for_context(context_tokens)


def config_to_json(
    config: TransformerConfig, *, original: Json | None = None, max_positions: int = 32_768
) -> dict[str, Any]:
    """A `config.json` that `transformers` reads.

    Args:
      config: of the model.
      original: the `config.json` that it was imported with: all its fields are kept. None writes one of the first
        family that can say what the config says.
      max_positions: longest sequence; written where there is no original.

    Raises:
      ValueError: when the original describes another model, or no family can express the config.
    """
    stored = {"dtype": config.parameter_dtype, "torch_dtype": config.parameter_dtype}
    if original is not None:
        if differing := _differences(config, config_from_json(original)):
            raise ValueError(
                f"the model differs from the original config.json in {', '.join(differing)}; export it without the "
                "original"
            )
        described = {**original, **{key: value for key, value in stored.items() if key in original or key == "dtype"}}
        described.pop("quantization_config", None)  # what is written is not quantised
        if isinstance(original.get("text_config"), dict):
            described["text_config"] = dict(original["text_config"])
        return described
    for architecture, family in FAMILIES.items():
        if family.experts not in (None, config.experts is not None):
            continue
        written = {
            "architectures": [architecture],
            "model_type": family.model_type,
            "vocab_size": config.vocabulary_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
            "rms_norm_eps": config.norm_epsilon,
            "max_position_embeddings": max_positions,
            "tie_word_embeddings": config.tie_embeddings,
            **rope_json(config),
            **family.json(config),
            **stored,
        }
        if written.get("rope_scaling", {}) is None:  # rope_parameters say it all, and some families read one of them
            del written["rope_scaling"]
        if "hidden_activation" in family.defaults:
            written["hidden_activation"] = written["hidden_act"]
        if _describes(written, config):
            return written
    raise ValueError(
        "no supported family has this combination of options, so that transformers could not run it; closest is to "
        "train one of the supported families: " + ", ".join(FAMILIES)
    )


def _describes(written: Json, config: TransformerConfig) -> bool:
    """Whether reading a `config.json` gives this config."""
    try:
        return not _differences(config, config_from_json(written))
    except ValueError:
        return False


def _differences(config: TransformerConfig, other: TransformerConfig) -> list[str]:
    """Fields in which two configs describe different models."""

    def plain(config: TransformerConfig) -> TransformerConfig:
        experts = None if config.experts is None else replace(config.experts, product="auto")
        pattern = config.windowed if config.window else (True,)
        scaling = config.rope_scaling
        return replace(
            config,
            experts=experts,
            window_pattern=pattern,
            rope_pattern=config.rotated,
            rope_scaling=None if scaling is None else replace(scaling, extended=None),
            head_width=config.head_size,
            mlp_width=config.mlp_size,
            query_scale=round(config.score_scale, 12),
            delta=None if config.delta is None else replace(config.delta, pattern=config.recurrent),
        )

    config, other = plain(config), plain(other)
    names = [field.name for field in fields(TransformerConfig) if field.name not in (*_EXECUTION, *_SET_BY_A_RUN)]
    return [name for name in names if getattr(config, name) != getattr(other, name)]


def _complete(source: Json, family: Family) -> dict[str, Any]:
    """Fill in the defaults of the family, and raise for missing fields that have none."""
    defaults = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False} | dict(family.defaults)
    if source.get("rope_scaling"):
        defaults.pop("rope_parameters", None)
    # Where a number must be, null says no more than nothing.
    said = {
        key: value for key, value in source.items() if value is not None or defaults.get(key) is None or key in _NULL
    }
    complete = defaults | said
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if missing := [key for key in needed if complete.get(key) is None]:
        raise ValueError(
            f"config.json of a {family.model_type} lacks {', '.join(missing)}; copy the file of the model again"
        )
    return complete
