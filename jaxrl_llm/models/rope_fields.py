"""Fields of rotary positions in `config.json`: the old and the new spelling, with one or two bases."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxrl_llm.models.rotary import RopeScaling
from jaxrl_llm.models.transformer_config import TransformerConfig

DEFAULT_BASE = 10_000.0
KINDS = {"linear", "dynamic", "llama3", "yarn", "longrope", "proportional"}
# For text, "mrope" (with positions in rows and columns of images) is the default; "su" is an older name of longrope.
_OTHER_NAMES = {"mrope": "default", "su": "longrope"}


def rope_fields(source: Mapping[str, Any], *, local: bool, read: Collection[str] = ()) -> dict[str, Any]:
    """rope_base, rope_scaling, local_rope_base and rope_fraction from config.json, in the old or the new spelling.

    Args:
      source: config.json, with `rope_parameters`, or with `rope_theta`, `rope_scaling` and `partial_rotary_factor`.
      local: some layers are windowed, so a second base is read.
      read: which of partial_rotary_factor and llama_4_scaling_beta this family uses; others ignore these fields.

    Raises:
      ValueError: for a kind of scaling that is not supported.
    """
    scaling, written = source.get("rope_scaling") or {}, source.get("rope_parameters") or {}
    nested = {
        key: written[key] for key in ("full_attention", "sliding_attention") if isinstance(written.get(key), dict)
    }
    if nested:
        full = {**nested.get("full_attention", {}), **scaling}
        # If each kind of layer has its own parameters, the outer field does not apply to them.
        outer = {key: value for key, value in source.items() if key != "original_max_position_embeddings"}
        full["truncate"] = written.get("truncate", True)
    else:
        full, outer = scaling or written, source
    base = full.get("rope_theta") or source.get("rope_theta") or DEFAULT_BASE
    scaled = _scaling(full, outer)
    if scaled is not None and (growth := full.get("llama_4_scaling_beta")) and "llama_4_scaling_beta" in read:
        scaled = replace(scaled, query_growth=float(growth))
    fields: dict[str, Any] = {"rope_base": float(base), "rope_scaling": scaled}
    if "partial_rotary_factor" in read:
        fraction = full.get("partial_rotary_factor") or source.get("partial_rotary_factor")
        fields["rope_fraction"] = float(fraction or 1.0)
    local_base = nested.get("sliding_attention", {}).get("rope_theta") or source.get("rope_local_base_freq")
    if local_base is None or not local:
        return fields
    if (kind := _kind(nested.get("sliding_attention", {}))) != "default":
        raise ValueError(
            f"config.json has rope_parameters.sliding_attention.rope_type {kind!r}; only default is supported there"
        )
    return fields | {"local_rope_base": float(local_base)}


def _kind(written: Mapping[str, Any]) -> str:
    kind = written.get("rope_type") or written.get("type") or "default"
    return _OTHER_NAMES.get(kind, kind)


def _scaling(written: Mapping[str, Any], source: Mapping[str, Any]) -> RopeScaling | None:
    kind = _kind(written)
    if kind == "default":
        return None
    if kind not in KINDS:
        raise ValueError(
            f"config.json has rope_scaling.rope_type {kind!r}, which is not supported; supported are default, "
            f"{', '.join(sorted(KINDS))}. Remove rope_scaling if the context of pre-training is long enough"
        )
    longest, factor = source.get("max_position_embeddings"), written.get("factor")
    # The outer field has precedence.
    context = source.get("original_max_position_embeddings") or written.get("original_max_position_embeddings")
    context = longest if kind == "dynamic" else context or longest
    if factor is None and kind in ("yarn", "longrope") and context and longest:
        factor = longest / context
    if kind == "proportional":
        return RopeScaling(kind, float(factor or 1.0), turning=float(written.get("partial_rotary_factor") or 1.0))
    if factor is None:
        raise ValueError(f"config.json has rope_scaling {dict(written)} without factor; add it")
    if kind == "linear":
        return RopeScaling("linear", float(factor))
    own: dict[str, Any] = {}
    if kind == "llama3":
        own = {
            "low_frequency": float(written.get("low_freq_factor", 1.0)),
            "high_frequency": float(written.get("high_freq_factor", 4.0)),
        }
    if kind == "yarn":
        own = {
            "beta_slow": float(written.get("beta_slow") or 1.0),
            "beta_fast": float(written.get("beta_fast") or 32.0),
            "truncate": bool(written.get("truncate", True)),
            "magnitude": _magnitude(written, float(factor)),
        }
    if kind == "longrope":
        own = {name: tuple(map(float, written.get(f"{name}_factor") or ())) for name in ("short", "long")}
        attention_factor = written.get("attention_factor")
        own["magnitude"] = None if attention_factor is None else float(attention_factor)
    return RopeScaling(kind, float(factor), context, **own)  # type: ignore[arg-type]


def _magnitude(written: Mapping[str, Any], factor: float) -> float | None:
    """Factor on cosine and sine in YaRN; None for the default of the paper."""
    if written.get("attention_factor") is not None:
        return float(written["attention_factor"])
    scale, scale_all = written.get("mscale"), written.get("mscale_all_dim")
    if not (scale and scale_all):
        return None
    grown = math.log(factor)
    return (0.1 * scale * grown + 1.0) / (0.1 * scale_all * grown + 1.0)


def rope_json(config: TransformerConfig) -> dict[str, Any]:
    """The fields of `config.json` in the old spelling, which all versions of transformers read."""
    written: dict[str, Any] = {"rope_theta": config.rope_base}
    if config.local_rope_base is not None:
        written["rope_local_base_freq"] = config.local_rope_base
    if config.rope_fraction != 1.0:
        written["partial_rotary_factor"] = config.rope_fraction
    scaling = config.rope_scaling
    if scaling is None:
        return written
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "dynamic":
        written["max_position_embeddings"] = scaling.original_positions
    elif scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
    if scaling.kind == "yarn":
        fields |= {"beta_slow": scaling.beta_slow, "beta_fast": scaling.beta_fast, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        fields |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    if scaling.magnitude is not None:
        fields["attention_factor"] = scaling.magnitude
    if scaling.query_growth:
        fields["llama_4_scaling_beta"] = scaling.query_growth
    return written | {"rope_scaling": fields}
