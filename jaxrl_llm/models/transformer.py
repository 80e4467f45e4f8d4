"""A decoder-only transformer as pure functions: RMSNorm, rotary positions, grouped-query attention, gated MLP.

One forward serves every family; what they differ in is in `TransformerConfig`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.models.attention import AttentionKind, KeyValues, attend, attention_in_use
from jaxrl_llm.models.cache import (
    Cache,
    KeysAndValues,
    init_cache,
    of_layer,
    remembered,
    replaced_row,
    taken_rows,
)
from jaxrl_llm.models.experts import expert_mlp, route
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.paged import PagedBlock, PagedCache, expanded, in_pages, paged_attention, written
from jaxrl_llm.models.parameters import initialise
from jaxrl_llm.models.projection import TURNED_FROM, project, turned
from jaxrl_llm.models.rematerialisation import ATTENDED, rematerialised
from jaxrl_llm.models.rotary import rotary_angles, rotate
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.models.transformer_specs import transformer_specs
from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.parallel.rules import ANY, ambient_layout, constrain

# What a forward pass can return besides its last hidden states.
OBSERVABLE = ("hidden_states", "router_choices", "router_probabilities")


class _Shared(NamedTuple):
    """What all blocks of one forward pass read.

    Attributes:
      config: sizes and switches.
      angles: rotary angles; with `local_angles` for windowed layers.
      positions: of the tokens of this call, [B, T].
      seen: of the keys, [B, S].
      used: tokens written into the cache before this call.
      kind: the attention path.
    """

    config: TransformerConfig
    angles: tuple[Array, Array]
    local_angles: tuple[Array, Array]
    positions: Int[Array, "B T"]
    seen: Int[Array, "B S"]
    used: Int[Array, ""]
    kind: AttentionKind


def rms_norm(
    x: Float[Array, "*B D"], gain: Float[Array, "D"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * (gain + offset), in float32, returned in the dtype of x."""
    wide, gain = x.astype(jnp.float32), gain.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normed * (gain + offset if offset else gain)).astype(x.dtype)


def _attention(params, shared: _Shared, x, windowed, cached):
    """What attention adds to the residual stream, and the filled cache of this block."""
    config, dtype = shared.config, x.dtype
    norm = partial(rms_norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    projected = project(norm(x, params["attention_norm"]), params["qkv"])
    if config.qkv_bias:
        projected = projected + params["qkv_bias"].astype(dtype)
    queries, keys, values = projected[..., :-2, :], projected[..., -2:-1, :], projected[..., -1, :]
    if config.qk_norm:
        queries, keys = norm(queries, params["query_norm"]), norm(keys, params["key_norm"])
    angles = shared.angles
    if config.local_rope_base is not None:
        if isinstance(windowed, bool):
            angles = shared.local_angles if windowed else angles
        else:
            angles = jax.tree.map(partial(jnp.where, windowed), shared.local_angles, angles)
    queries, keys = rotate(queries, angles), rotate(keys, angles)[..., 0, :]
    # Each device holds the queries of its own positions; the keys and values of all are gathered (context parallelism).
    queries = constrain(queries, "rows", "positions", "kv_heads")
    new = KeysAndValues(
        constrain(keys.transpose(0, 2, 3, 1), "rows", "kv_heads", None, None),
        constrain(values.swapaxes(1, 2), "rows", "kv_heads", None),
    )
    scores = {
        "scale": config.score_scale,
        "window": config.window,
        "windowed": windowed,
        "cap": config.attention_cap,
    }
    filled, context = None, ()
    if isinstance(cached, PagedBlock):
        filled = written(cached, shared.positions, new)
        attended = paged_attention(queries, cached._replace(pages=filled), shared.positions, **scores)
    else:
        if cached is not None:
            stored, layer, context = cached
            filled = remembered(stored, layer, new, shared.used, shared.seen.shape[1])
            # A pass that fills its whole cache has just computed what the cache holds.
            new = new if shared.kind != "plain" else of_layer(filled, layer)
        own = KeyValues(new.keys, new.values, shared.seen)
        attended = attend(queries, own, shared.positions, context, **scores, kind=shared.kind)
    added = project(checkpoint_name(attended, ATTENDED), params["attention_out"], inputs=3)
    if config.attention_out_bias:
        added = added + params["attention_out_bias"].astype(dtype)
    return norm(added, params["attention_post_norm"]) if config.post_norms else added, filled


def _mlp(params, config: TransformerConfig, x, choices):
    """What the MLP or the mixture of experts adds to the residual stream, and what the router did."""
    norm = partial(rms_norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    activation = jax.nn.silu if config.activation == "silu" else partial(jax.nn.gelu, approximate=True)
    normed, observed = norm(x, params["mlp_norm"]), {}
    if config.experts is None:
        gate_up = project(normed, params["gate_up"])
        activated = activation(gate_up[..., 0, :]) * gate_up[..., 1, :]
        added = project(activated, params["down"])
    else:
        dtype = x.dtype
        routing = route(normed, params["router"].astype(dtype), config.experts, choices)
        gate_up, down = params["gate_up"].astype(dtype), params["down"].astype(dtype)
        added = expert_mlp(normed, routing, gate_up, down, activation=activation, ragged=config.experts.ragged)
        observed = {"router_choices": routing.choices, "router_probabilities": routing.probabilities}
    return norm(added, params["mlp_post_norm"]) if config.post_norms else added, observed


def _block(params, shared: _Shared, x, windowed, choices, cached):
    """One block: (residual stream, filled cache, what can be observed).

    `cached` is None, or what is being written (see `remembered`), `layer`, and the context of this block; or its pages.
    """
    added, filled = _attention(params, shared, x, windowed, cached)
    x = constrain(x + added, "rows", "positions", None)
    added, observed = _mlp(params, shared.config, x, choices)
    x = constrain(x + added, "rows", "positions", None)
    return x, filled, observed | {"hidden_states": x}


def _run_block(shared: _Shared, windowed, cached):
    """`_block` as a function of what is differentiated; without a cache it keeps what the config says."""

    def run(params, x, choices):
        return _block(params, shared, x, windowed, choices, cached)

    return run if cached is not None else rematerialised(run, shared.config.remat)


def observed_forward(
    params: PyTree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache | PagedCache | None = None,
    *,
    config: TransformerConfig,
    names: Collection[str] = (),
    router_choices: Int[Array, "L B T k"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | PagedCache | None, dict[str, Array]]:
    """`forward`, and what happened inside.

    Args:
      params, tokens, positions, cache, config, router_choices: as for `forward`.
      names: what to return: "hidden_states" [L + 1, B, T, D], the embedded tokens and the residual stream after each
        block, before the final norm; "router_choices" [L, B, T, k]; "router_probabilities" [L, B, T, E].

    Returns:
      hidden states, the filled cache, and what was asked for by name.

    Raises:
      ValueError: for a name that this model does not have.
    """
    known = OBSERVABLE if config.experts is not None else OBSERVABLE[:1]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"a forward pass of this model cannot return {', '.join(unknown)}; known: {', '.join(known)}")
    if router_choices is not None and config.experts is None:
        raise ValueError("router_choices were given to a model without experts; leave them out, or set model.experts")

    table = constrain(params["embedding"].astype(config.compute_dtype), "vocabulary", None)
    tokens, positions = (constrain(x, "rows", "positions") for x in (tokens, positions))
    x = constrain(table[tokens], "rows", "positions", None)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    used, seen, before = jnp.int32(0), positions, 0
    if isinstance(cache, Cache):
        used = cache.used
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, used % cache.positions.shape[1]))
        before = sum(part.positions.shape[1] for part in cache.context)
    angles = rotary_angles(positions, config.rotary_size, config.rope_base, config.rope_scaling)
    local = angles
    if config.local_rope_base is not None:
        local = rotary_angles(positions, config.rotary_size, config.local_rope_base)
    kind = attention_path(config, queries=tokens.shape[1], keys=seen.shape[1] + before)
    shared = _Shared(config, angles, local, positions, seen, used, kind)

    keep = lambda observed: {name: observed[name] for name in names}  # noqa: E731
    embedded = x[None]
    loop = _unrolled_blocks if config.unrolled else _scanned_blocks
    x, layers, observed = loop(params, shared, x, router_choices, cache, keep)
    if "hidden_states" in observed:
        observed["hidden_states"] = jnp.concatenate([embedded, observed["hidden_states"]])
    hidden = rms_norm(x, params["final_norm"], config.norm_epsilon, config.norm_offset)
    if isinstance(cache, PagedCache):
        cache = cache._replace(pages=layers, length=jnp.maximum(cache.length, positions.max(axis=1) + 1))
    elif cache is not None:
        cache = cache._replace(layers=layers, positions=seen, used=used + tokens.shape[1])
    return hidden, cache, observed


def _cached(cache: Cache | PagedCache | None, carried, layer: Array | int, config: TransformerConfig):
    """What one block is given of the cache; `carried` is what the blocks before it have filled."""
    if cache is None:
        return None
    if isinstance(cache, PagedCache):
        return PagedBlock(carried, cache.table, layer * cache.pages_per_layer(config.layers))
    if isinstance(layer, int):
        return cache.layers[layer], None, _context(cache, layer)
    return carried, layer, _context(cache, layer)


def _context(cache: Cache, layer: Array | int) -> tuple[KeyValues, ...]:
    """What one block may read of what was written before."""
    index = (lambda layers: layers[layer]) if isinstance(layer, int) else partial(of_layer, layer=layer)
    parts = [(index(part.layers), part.positions) for part in cache.context]
    return tuple(KeyValues(pair.keys, pair.values, seen) for pair, seen in parts)


def _unrolled_blocks(params, shared, x, router_choices, cache, keep):
    filled, all_observed = [], []
    carried = cache.pages if isinstance(cache, PagedCache) else None
    for index, block_params in enumerate(unstack(params, shared.config)["blocks"]):
        choices = None if router_choices is None else router_choices[index]
        cached = _cached(cache, carried, index, shared.config)
        run = _run_block(shared, shared.config.windowed[index], cached)
        x, carried, observed = run(block_params, x, choices)
        filled.append(carried)
        all_observed.append(keep(observed))
    layers = carried if isinstance(cache, PagedCache) else tuple(filled)
    return x, layers, jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_observed)


def _scanned_blocks(params, shared, x, router_choices, cache, keep):
    windowed = shared.config.windowed

    # The cache is carried, not scanned over: each block writes its new slots in place, and nothing is copied.
    def body(carry, xs):
        x, layers = carry
        block_params, layer, local, choices = xs
        block_params = _where_they_lie(block_params, shared.config)
        # Where all layers are of one kind, the program knows it; else each reads its own from an array.
        local = windowed[0] if len(set(windowed)) == 1 else local
        cached = _cached(cache, layers, layer, shared.config)
        x, layers, observed = _run_block(shared, local, cached)(block_params, x, choices)
        return (x, layers), keep(observed)

    start = cache.pages if isinstance(cache, PagedCache) else None if cache is None else cache.layers
    xs = (params["blocks"], jnp.arange(len(windowed)), jnp.asarray(windowed), router_choices)
    (x, layers), observed = jax.lax.scan(body, (x, start), xs)
    return x, layers, observed


def _where_they_lie(block_params, config: TransformerConfig):
    """Parameters of one block of a scan, pinned to where they lie in the stack, and their gradients with them.

    Left to itself the compiler sums a gradient everywhere in each turn of the loop, to keep a part of the sum.
    """
    specs = transformer_specs(config)["blocks"]

    def pinned(name, leaf):
        axes = specs[name].axes[1:] if name in specs else ()
        return constrain(leaf, *axes) if getattr(leaf, "ndim", None) == len(axes) > 1 else leaf

    return {name: pinned(name, leaf) for name, leaf in block_params.items()}


def forward(
    params: PyTree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache | PagedCache | None = None,
    *,
    config: TransformerConfig,
    router_choices: Int[Array, "L B T k"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | PagedCache | None]:
    """Hidden states after the final norm; the cached and the uncached pass are this one function.

    Args:
      params: as `transformer_specs` describes; `blocks` may also be a tuple with one tree a block (see `unstack`).
      tokens: token ids; ids at padding positions are read and ignored.
      positions: index of each token in its own sequence, -1 for padding.
      cache: None, or a cache whose next T slots are filled with this call's keys and values.
      config: sizes and switches.
      router_choices: experts recorded by an earlier `observed_forward`, taken again instead of the router's.

    Returns:
      hidden states in the compute dtype, and the filled cache (None when none was given).
    """
    return observed_forward(params, tokens, positions, cache, config=config, router_choices=router_choices)[:2]


def attention_path(config: TransformerConfig, *, queries: int, keys: int | None = None) -> AttentionKind:
    """How this model computes attention of `queries` tokens a row that look at `keys` slots (as many)."""
    return attention_in_use(
        config.attention,
        queries=queries,
        keys=queries if keys is None else keys,
        head_size=config.head_size,
        dtype=config.compute_dtype,
        cap=config.attention_cap,
    )


def unstack(params: PyTree, config: TransformerConfig) -> PyTree:
    """Split stacked blocks into a tuple when they are unrolled, so that a decode loop does not slice at every token."""
    if not config.unrolled or isinstance(params["blocks"], tuple):
        return params
    blocks = tuple(jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(config.layers))  # noqa: B023
    return params | {"blocks": blocks}


def for_decoding(params: PyTree, config: TransformerConfig) -> PyTree:
    """Parameters laid out for many small steps: unstacked, and on a CPU with their large matrices `Turned`."""
    params = unstack(params, config)
    split = (ambient := ambient_layout()) is not None and ambient.mesh.size > 1
    if not isinstance(params["blocks"], tuple) or backend_in_use() != "cpu" or split:
        return params
    inputs = {"qkv": 1, "attention_out": 3} | ({"gate_up": 1, "down": 1} if config.experts is None else {})

    def laid_out(block):
        large = {
            name: turned(matrix, inputs=count)
            for name, count in inputs.items()
            if isinstance(matrix := block[name], jax.Array) and matrix.size >= TURNED_FROM
        }
        return block | large

    return params | {"blocks": tuple(laid_out(block) for block in params["blocks"])}


def logits(params: PyTree, hidden: Float[Array, "*B D"], *, cap: float | None = None) -> Float[Array, "*B V"]:
    """Scores of the next symbol in float32, before temperature; with a cap, cap * tanh(scores / cap)."""
    table = params.get("unembedding", params["embedding"]).astype(hidden.dtype)
    scores = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    # Scores move on to where they are drawn from; the table stays where it is.
    scores = constrain(scores, "rows", *[ANY] * (scores.ndim - 2), "vocabulary") if scores.ndim > 1 else scores
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _shared_scoring(config: TransformerConfig) -> bool:
    """Whole sequences are best scored at once where a kernel attends, and layers that are scanned over would keep a
    cache for each of them."""
    plain = config.attention == "plain" or (config.attention == "auto" and backend_in_use() == "cpu")
    return plain and config.unrolled and config.cache_dtype == "compute" and not in_pages(config)


def transformer(config: TransformerConfig) -> Model:
    """The `Model` that a config describes.

    >>> model = transformer(TransformerConfig(vocabulary_size=11, width=16, layers=1, heads=2, kv_heads=1))
    >>> params = model.init(jax.random.key(0))
    >>> hidden, _ = model.apply(params, jnp.array([[1, 2, 3]]), jnp.array([[0, 1, 2]]), None)
    >>> hidden.shape, model.logits(params, hidden).shape
    ((1, 3, 16), (1, 3, 11))
    """
    specs = transformer_specs(config)
    return Model(
        init=partial(initialise, specs),
        apply=partial(forward, config=config),
        logits=partial(logits, cap=config.logits_cap),
        init_cache=partial(init_cache, config=config),
        expand_cache=partial(expanded, config=config),
        for_decoding=partial(for_decoding, config=config),
        shared_scoring=_shared_scoring(config),
        take_rows=taken_rows,
        replace_row=replaced_row,
        specs=specs,
        vocabulary_size=config.vocabulary_size,
        config=config,
        observe=partial(observed_forward, config=config),
        routed=config.experts is not None,
    )
