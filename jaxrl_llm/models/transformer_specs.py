"""The parameters of the transformer, before they exist."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from jaxrl_llm.models.parameters import ParameterSpec
from jaxrl_llm.models.transformer_config import TransformerConfig


def transformer_specs(config: TransformerConfig) -> dict:
    """Describe every parameter. Blocks are stacked on a leading axis.

    Query, key and value projections are one matrix, grouped by key/value head, so that one product computes them
    and a split over key/value heads keeps every group whole. Gate and up are one matrix likewise.
    """
    c, layers = config, config.layers
    mlp_width = c.mlp_size
    into, out_scale = c.width**-0.5, (2 * layers) ** -0.5
    spec = partial(ParameterSpec, dtype=jnp.dtype(c.parameter_dtype))
    gain = partial(spec, scale=0.0, fill=1.0 - c.norm_offset)
    bias = partial(spec, scale=0.0, fill=0.0)
    block = {
        "attention_norm": gain((layers, c.width), ("layer", None)),
        "qkv": spec(
            (layers, c.width, c.kv_heads, c.queries_per_kv + 2, c.head_size),
            ("layer", "embed", "kv_heads", None, None),
            into,
        ),
        "attention_out": spec(
            (layers, c.kv_heads, c.queries_per_kv, c.head_size, c.width),
            ("layer", "kv_heads", None, None, "embed"),
            out_scale * (c.heads * c.head_size) ** -0.5,
        ),
        "mlp_norm": gain((layers, c.width), ("layer", None)),
    }
    many, expert = ((), ()) if c.experts is None else ((c.experts.count,), ("expert",))
    block["gate_up"] = spec((layers, *many, c.width, 2, mlp_width), ("layer", *expert, "embed", None, "mlp"), into)
    block["down"] = spec(
        (layers, *many, mlp_width, c.width), ("layer", *expert, "mlp", "embed"), out_scale * mlp_width**-0.5
    )
    if c.experts is not None:
        block["router"] = spec((layers, c.width, c.experts.count), ("layer", "embed", None), into)
    if c.qk_norm:
        block["query_norm"] = gain((layers, c.head_size), ("layer", None))
        block["key_norm"] = gain((layers, c.head_size), ("layer", None))
    if c.qkv_bias:
        block["qkv_bias"] = bias(
            (layers, c.kv_heads, c.queries_per_kv + 2, c.head_size), ("layer", "kv_heads", None, None)
        )
    if c.attention_out_bias:
        block["attention_out_bias"] = bias((layers, c.width), ("layer", None))
    if c.post_norms:
        block["attention_post_norm"] = gain((layers, c.width), ("layer", None))
        block["mlp_post_norm"] = gain((layers, c.width), ("layer", None))
    specs = {
        "embedding": spec((c.vocabulary_size, c.width), ("vocabulary", "embed"), into),
        "blocks": block,
        "final_norm": gain((c.width,), (None,)),
    }
    if not c.tie_embeddings:
        specs["unembedding"] = spec((c.vocabulary_size, c.width), ("vocabulary", "embed"), into)
    return specs
