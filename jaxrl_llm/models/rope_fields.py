"""Rotary positions in `config.json`: the old fields, the new ones, and one or two bases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.models.rotary import RopeScaling
from jaxrl_llm.models.transformer_config import TransformerConfig

DEFAULT_BASE = 10_000.0
_SUPPORTED = "default, linear, llama3, yarn"


def rope_fields(source: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """rope_base, rope_scaling and local_rope_base from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    Args:
      source: config.json.
      local: some layer is windowed, so that a second base matters.

    Raises:
      ValueError: for a kind of scaling that the decoder does not have.
    """
    written = source.get("rope_parameters") or source.get("rope_scaling") or {}
    nested = {
        key: written[key] for key in ("full_attention", "sliding_attention") if isinstance(written.get(key), dict)
    }
    full = nested.get("full_attention", {} if nested else written)
    base = full.get("rope_theta") or source.get("rope_theta") or DEFAULT_BASE
    fields: dict[str, Any] = {"rope_base": float(base), "rope_scaling": _scaling(full, source)}
    local_base = nested.get("sliding_attention", {}).get("rope_theta") or source.get("rope_local_base_freq")
    if local_base is None or not local:
        return fields
    if (kind := _kind(nested.get("sliding_attention", {}))) != "default":
        raise ValueError(
            f"config.json has rope_parameters.sliding_attention.rope_type {kind!r}; only default is supported there"
        )
    return fields | {"local_rope_base": float(local_base)}


def _kind(written: Mapping[str, Any]) -> str:
    return written.get("rope_type") or written.get("type") or "default"


def _scaling(written: Mapping[str, Any], source: Mapping[str, Any]) -> RopeScaling | None:
    kind = _kind(written)
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"config.json has rope_scaling.rope_type {kind!r}, which is not supported; supported are {_SUPPORTED}. "
            "Remove rope_scaling where the context of pre-training is long enough"
        )
    context = (
        written.get("original_max_position_embeddings")
        or source.get("original_max_position_embeddings")
        or source.get("max_position_embeddings")
    )
    factor = written.get("factor")
    if factor is None and kind == "yarn" and context and source.get("max_position_embeddings"):
        factor = source["max_position_embeddings"] / context
    if factor is None:
        raise ValueError(f"config.json has rope_scaling {dict(written)} without factor; add it")
    if kind == "linear":
        return RopeScaling("linear", float(factor))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(factor),
            context,
            low_frequency=float(written.get("low_freq_factor", 1.0)),
            high_frequency=float(written.get("high_freq_factor", 4.0)),
        )
    return RopeScaling(
        "yarn",
        float(factor),
        context,
        beta_slow=float(written.get("beta_slow") or 1.0),
        beta_fast=float(written.get("beta_fast") or 32.0),
        truncate=bool(written.get("truncate", True)),
        magnitude=_magnitude(written, float(factor)),
    )


def _magnitude(written: Mapping[str, Any], factor: float) -> float | None:
    """Factor on cosine and sine of YaRN, None for the default of the paper."""
    if written.get("attention_factor") is not None:
        return float(written["attention_factor"])
    scale, scale_all = written.get("mscale"), written.get("mscale_all_dim")
    if not (scale and scale_all):
        return None
    grown = math.log(factor)
    return (0.1 * scale * grown + 1.0) / (0.1 * scale_all * grown + 1.0)


def rope_json(config: TransformerConfig) -> dict[str, Any]:
    """The fields of `config.json`, in the old writing, which all versions of transformers read."""
    written: dict[str, Any] = {"rope_theta": config.rope_base}
    if config.local_rope_base is not None:
        written["rope_local_base_freq"] = config.local_rope_base
    scaling = config.rope_scaling
    if scaling is None:
        return written
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
    if scaling.kind == "yarn":
        fields |= {"beta_slow": scaling.beta_slow, "beta_fast": scaling.beta_fast, "truncate": scaling.truncate}
        if scaling.magnitude is not None:
            fields["attention_factor"] = scaling.magnitude
    return written | {"rope_scaling": fields}
