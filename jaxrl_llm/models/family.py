"""The description of a model family: how its `config.json` is read and written, and its defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.transformer_config import TransformerConfig

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one architecture writes its `config.json`.

    Attributes:
      model_type: its name in `config.json`.
      has: its components, for the documentation.
      fields: config.json -> the fields of `TransformerConfig` that are the family's own.
      json: the reverse.
      defaults: values of missing keys of `config.json`.
      experts: its blocks are mixtures of experts; None where they may be.
      rope: keys of rotary positions that it reads and others do not, see `rope_fields`.
    """

    model_type: str
    has: str
    fields: Callable[[Json], dict[str, Any]]
    json: Callable[[TransformerConfig], dict[str, Any]]
    defaults: Json
    experts: bool | None = False
    rope: tuple[str, ...] = ()


def refuse(source: Json, key: str, meaning: str) -> None:
    """Raise ValueError if config.json enables a feature that the decoder does not support."""
    if source.get(key):
        raise ValueError(
            f"config.json has {key} {source[key]!r}: {meaning} are not supported; use a checkpoint without"
        )


def windows(source: Json, pattern: Callable[[int], bool]) -> dict[str, Any]:
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
    if not window or not any(windowed):
        return {}
    return {"window": window, "window_pattern": shortest_pattern(windowed)}


def shortest_pattern(values: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest tuple that, repeated, gives these values.

    >>> shortest_pattern((True, False, True, False, True))
    (True, False)
    """
    periods = (n for n in range(1, len(values) + 1) if all(v == values[i % n] for i, v in enumerate(values)))
    return values[: next(periods)]


def layer_types(config: TransformerConfig) -> list[str]:
    """`layer_types` of config.json."""
    return ["sliding_attention" if local else "full_attention" for local in config.windowed]


def llama_fields(source: Json) -> dict[str, Any]:
    """Without norms of queries and keys; biases everywhere or nowhere, in attention and in the MLP."""
    biased = bool(source.get("attention_bias"))
    return {
        "qk_norm": False,
        "qkv_bias": biased,
        "attention_out_bias": biased,
        "mlp_bias": bool(source.get("mlp_bias")),
    }


def llama_json(config: TransformerConfig) -> dict[str, Any]:
    """The reverse of `llama_fields`."""
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
