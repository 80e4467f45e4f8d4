"""Descriptions of the parameters of the transformer."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from jaxrl_llm.models.parameters import ParameterSpec
from jaxrl_llm.models.transformer_config import TransformerConfig


def transformer_specs(config: TransformerConfig) -> dict:
    """Describe every parameter. Blocks are stacked on a leading axis, in the stacks of `TransformerConfig.stacks`.

    Query, key and value projections are one matrix, grouped by key/value head, so that one product computes them and
    sharding over key/value heads keeps each group on one device. Gate and up are also one matrix.
    """
    c = config
    spec = partial(ParameterSpec, dtype=jnp.dtype(c.parameter_dtype))
    gain = partial(spec, scale=0.0, fill=1.0 - c.norm_offset)
    into = c.width**-0.5
    stacks = {
        name: (_delta(c, len(layers)) if name == "delta_blocks" else _attention(c, name, len(layers)))
        | _mlp(c.of_stack(name), len(layers), routed=c.experts is not None and name != "dense_blocks")
        | _per_layer(c, len(layers))
        for name, layers in c.stacks.items()
    }
    specs = {
        "embedding": spec((c.vocabulary_size, c.width), ("vocabulary", "embed"), into),
        **stacks,
        "final_norm": gain((c.width,), (None,)),
    }
    if c.per_layer is not None:
        width = c.per_layer.width
        specs |= {
            "per_layer_embedding": spec(
                (c.per_layer.vocabulary_size, c.layers, width), ("vocabulary", None, "embed"), width**-0.5
            ),
            "per_layer_projection": spec((c.width, c.layers, width), ("embed", None, None), into),
            "per_layer_norm": gain((width,), (None,)),
        }
    if not c.tie_embeddings:
        specs["unembedding"] = spec((c.vocabulary_size, c.width), ("vocabulary", "embed"), into)
    return specs


def _makers(c: TransformerConfig):
    """Functions that describe (a weight, the gain of a norm, a bias) in the config's dtype."""
    spec = partial(ParameterSpec, dtype=jnp.dtype(c.parameter_dtype))
    return spec, partial(spec, scale=0.0, fill=1.0 - c.norm_offset), partial(spec, scale=0.0, fill=0.0)


def _out_scale(c: TransformerConfig) -> float:
    return (2 * c.layers) ** -0.5


def _norms(c: TransformerConfig, layers: int, part: str) -> dict[str, ParameterSpec]:
    """The norms before and after the attention or the MLP."""
    gain = _makers(c)[1]
    names = [f"{part}_norm"] * c.pre_norms + [f"{part}_post_norm"] * c.post_norms
    return {name: gain((layers, c.width), ("layer", None)) for name in names}


def _per_layer(c: TransformerConfig, layers: int) -> dict[str, ParameterSpec]:
    """The projections of a layer's own embedding, and the scalar after the layer."""
    spec, gain, _ = _makers(c)
    block = {"layer_scale": spec((layers, 1), ("layer", None), 0.0)} if c.layer_scales else {}
    if c.per_layer is None:
        return block
    width = c.per_layer.width
    return block | {
        "per_layer_gate": spec((layers, c.width, width), ("layer", "embed", None), c.width**-0.5),
        "per_layer_up": spec((layers, width, c.width), ("layer", None, "embed"), _out_scale(c) * width**-0.5),
        "per_layer_post_norm": gain((layers, c.width), ("layer", None)),
    }


def _fused(c: TransformerConfig, slots: int, layers: int) -> dict[str, ParameterSpec]:
    spec = _makers(c)[0]
    shape = (layers, c.width, c.kv_heads, slots, c.head_size)
    return {"qkv": spec(shape, ("layer", "embed", "kv_heads", None, None), c.width**-0.5)}


def _latent(c: TransformerConfig, layers: int) -> dict[str, ParameterSpec]:
    """Projections down to latents and up from them; the head axis is the one that attention is sharded over."""
    spec, gain, _ = _makers(c)
    assert c.latent is not None
    sizes = c.latent
    down = lambda width: spec((layers, c.width, width), ("layer", "embed", None), c.width**-0.5)  # noqa: E731
    norm = lambda width: gain((layers, width), ("layer", None))  # noqa: E731

    def up(inputs: int, outputs: int, axis: str | None) -> ParameterSpec:
        return spec((layers, inputs, c.heads, outputs), ("layer", axis, "kv_heads", None), inputs**-0.5)

    narrow = sizes.query_rank
    queries = {} if narrow is None else {"query_down": down(narrow), "query_norm": norm(narrow)}
    return queries | {
        "query_up": up(narrow or c.width, sizes.plain_width + sizes.rope_width, "embed" if narrow is None else None),
        "latent_down": down(sizes.rank + sizes.rope_width),
        "latent_norm": norm(sizes.rank),
        "latent_up": up(sizes.rank, sizes.plain_width + sizes.value_width, None),
    }


def _attention(whole: TransformerConfig, stack: str, layers: int) -> dict[str, ParameterSpec]:
    c, slots = whole.of_stack(stack), whole.slots_of(stack)
    spec, gain, bias = _makers(c)
    block = _norms(c, layers, "attention") | (_fused(c, slots, layers) if c.latent is None else _latent(c, layers))
    value_width = c.head_size if c.latent is None else c.latent.value_width
    block["attention_out"] = spec(
        (layers, c.kv_heads, c.queries_per_kv, value_width, c.width),
        ("layer", "kv_heads", None, None, "embed"),
        _out_scale(c) * (c.heads * value_width) ** -0.5,
    )
    if c.qk_norm:
        everywhere = c.qk_norm_span == "all_heads"
        kv, group = ((c.kv_heads,), (c.queries_per_kv,)) if everywhere else ((), ())
        named = ("kv_heads",) * everywhere
        block["query_norm"] = gain((layers, *kv, *group, c.head_size), ("layer", *named, *(None,) * (everywhere + 1)))
        if "reading" not in stack:
            block["key_norm"] = gain((layers, *kv, c.head_size), ("layer", *named, None))
    if c.qkv_bias:
        block["qkv_bias"] = bias((layers, c.kv_heads, slots, c.head_size), ("layer", "kv_heads", None, None))
    if c.attention_out_bias:
        block["attention_out_bias"] = bias((layers, c.width), ("layer", None))
    if c.attention_sinks:
        block["sinks"] = bias((layers, c.kv_heads, c.queries_per_kv), ("layer", "kv_heads", None))
    return block


def _delta(c: TransformerConfig, layers: int) -> dict[str, ParameterSpec]:
    """One matrix gives queries, keys, values and gates of a key head, another the two scalars of each value head."""
    spec, _, _ = _makers(c)
    delta = c.delta
    assert delta is not None
    heads, group, width = delta.key_heads, delta.values_per_key, delta.value_width
    split = ("layer", "embed", "kv_heads", None)
    constant = partial(spec, (layers, heads, group), ("layer", "kv_heads", None), 0.0)
    return _norms(c, layers, "attention") | {
        "delta_in": spec((layers, c.width, heads, delta.mixed_width + group * width), split, c.width**-0.5),
        "delta_gates": spec((layers, c.width, heads, 2 * group), split, c.width**-0.5),
        "delta_conv": spec(
            (layers, heads, delta.mixed_width, 1, delta.kernel),
            ("layer", "kv_heads", None, None, None),
            delta.kernel**-0.5,
        ),
        # e^-softplus(0): the state decays by half at each token.
        "delta_decay": constant(fill=0.0),
        "delta_rate": constant(fill=0.0),
        "delta_norm": spec((layers, width), ("layer", None), 0.0),
        "delta_out": spec(
            (layers, heads, group, width, c.width),
            ("layer", "kv_heads", None, None, "embed"),
            _out_scale(c) * (delta.value_heads * width) ** -0.5,
        ),
    }


def _mlp(c: TransformerConfig, layers: int, *, routed: bool) -> dict[str, ParameterSpec]:
    spec, gain, bias = _makers(c)
    into, out = c.width**-0.5, _out_scale(c)
    experts = c.experts if routed else None
    width = c.mlp_size if c.experts is None or routed else (c.experts.dense_width or 0)

    def gated(prefix: str, width: int, many: tuple, expert: tuple) -> dict[str, ParameterSpec]:
        return {
            f"{prefix}gate_up": spec(
                (layers, *many, c.width, 2, width), ("layer", *expert, "embed", None, "mlp"), into
            ),
            f"{prefix}down": spec(
                (layers, *many, width, c.width), ("layer", *expert, "mlp", "embed"), out * width**-0.5
            ),
        }

    many, expert = ((), ()) if experts is None else ((experts.count,), ("expert",))
    block = _norms(c, layers, "mlp") | gated("", width, many, expert)
    if c.mlp_bias:
        block["gate_up_bias"] = bias((layers, *many, 2, width), ("layer", *expert, None, "mlp"))
        block["down_bias"] = bias((layers, *many, c.width), ("layer", *expert, None))
    if experts is None:
        return block
    block["router"] = spec((layers, c.width, experts.count), ("layer", "embed", None), into)
    if experts.router_bias:
        block["router_bias"] = bias((layers, experts.count), ("layer", None))
    if experts.selection_bias:
        # In float32, because small differences change which experts are chosen.
        block["selection_bias"] = bias((layers, experts.count), ("layer", None), dtype=jnp.float32)
    if experts.own_norms:
        named = ("experts_norm", "experts_post_norm", "shared_post_norm", "router_gain")
        block |= {name: gain((layers, c.width), ("layer", None)) for name in named}
        block["expert_factor"] = spec((layers, experts.count), ("layer", None), 0.0)
    if experts.shared_width is not None:
        block |= gated("shared_", experts.shared_width, (), ())
    if experts.shared_gate:
        block["shared_gate"] = spec((layers, c.width, 1), ("layer", "embed", None), into)
    return block
