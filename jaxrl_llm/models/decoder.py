"""A decoder-only transformer as pure functions: embedding, blocks one after the other or scanned over, scores.

One forward function supports every family; `TransformerConfig` holds their differences.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.models.attention import AttentionKind, KeyValues, attention_in_use
from jaxrl_llm.models.block import Layer, Shared, rms_norm, run_block
from jaxrl_llm.models.cache import (
    Cache,
    KeysAndValues,
    Recent,
    cut_cache,
    init_cache,
    keep_window,
    of_layer,
    replaced_row,
    taken_rows,
)
from jaxrl_llm.models.latent import latent_values
from jaxrl_llm.models.layer_runs import Run, cache_of_layer, in_runs, layer_runs
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.paged import PagedBlock, PagedCache, expanded, in_pages
from jaxrl_llm.models.parameters import initialise
from jaxrl_llm.models.projection import TURNED_FROM, project, turned
from jaxrl_llm.models.rotary import require_in_context, rotary_angles
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.models.transformer_specs import transformer_specs
from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.parallel.rules import ANY, ambient_layout, constrain

# Values that a forward pass can return besides its last hidden states.
OBSERVABLE = ("hidden_states", "router_choices", "router_probabilities")


def observed_forward(
    params: PyTree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache | PagedCache | None = None,
    *,
    config: TransformerConfig,
    names: Collection[str] = (),
    router_choices: Int[Array, "L B T k"] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | PagedCache | None, dict[str, Array]]:
    """`forward`, with intermediate values.

    Args:
      params, tokens, positions, cache, config, router_choices, segments: as for `forward`.
      names: what to return: "hidden_states" [L + 1, B, T, D], the embedded tokens and the residual stream after each
        block, before the final norm; "router_choices" [L, B, T, k] and "router_probabilities" [L, B, T, E] of the L
        blocks that have experts.

    Returns:
      hidden states, the filled cache, and the requested values by name.

    Raises:
      ValueError: for a name that this model does not have, or packed rows that go on from a cache.
    """
    known = OBSERVABLE if config.experts is not None else OBSERVABLE[:1]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"a forward pass of this model cannot return {', '.join(unknown)}; known: {', '.join(known)}")
    if router_choices is not None and config.experts is None:
        raise ValueError("router_choices were given to a model without experts; leave them out, or set model.experts")

    if segments is not None and cache is not None:
        raise ValueError("segments were given with a cache, which remembers one sequence a row; leave one of them out")
    table = constrain(params["embedding"].astype(config.compute_dtype), "vocabulary", None)
    tokens, positions = (constrain(x, "rows", "positions") for x in (tokens, positions))
    x = constrain(table[tokens], "rows", "positions", None)
    scaling = config.rope_scaling
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    used, seen, before, recent = jnp.int32(0), positions, 0, None
    if isinstance(cache, Cache):
        used = cache.used
        recent = None if cache.recent is None else _with_one_more(cache.recent, positions)
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, used % cache.positions.shape[1]))
        before = sum(part.positions.shape[1] for part in cache.context)
    require_in_context(config.rope_scaling, seen.shape[1] + before)
    everywhere = config.of_stack("global_blocks")
    angles = rotary_angles(positions, everywhere.rotary_size, config.rope_base, scaling)
    local, growth = None, None
    if config.local_rope_base is not None:
        local = rotary_angles(positions, config.rotary_size, config.local_rope_base)
    elif config.rotary_size != everywhere.rotary_size:
        local = rotary_angles(positions, config.rotary_size, config.rope_base, scaling)
    if scaling is not None and scaling.query_growth:
        turns = jnp.floor(jnp.maximum(positions, 0) / (scaling.original_positions or 1))
        growth = 1.0 + scaling.query_growth * jnp.log1p(turns)
    kind = attention_path(config, queries=tokens.shape[1], keys=seen.shape[1] + before)
    per_layer = _layer_embeddings(params, tokens, x, config)
    shared = Shared(config, angles, local, growth, positions, seen, used, kind, per_layer, segments, recent)

    keep = lambda observed: {name: observed[name] for name in names if name in observed}  # noqa: E731
    embedded = x[None]
    loop = _unrolled_blocks if config.unrolled else _scanned_blocks
    x, layers, observed = loop(params, shared, x, router_choices, cache, keep)
    if "hidden_states" in observed:
        observed["hidden_states"] = jnp.concatenate([embedded, observed["hidden_states"]])
    hidden = rms_norm(x, params["final_norm"], config.norm_epsilon, config.norm_offset)
    if isinstance(cache, PagedCache):
        cache = cache._replace(pages=layers, length=jnp.maximum(cache.length, positions.max(axis=1) + 1))
    elif cache is not None:
        recent = None if recent is None else recent._replace(used=recent.used + 1)
        cache = cache._replace(layers=layers, positions=seen, used=used + tokens.shape[1], recent=recent)
    return hidden, cache, observed


def _with_one_more(recent: Recent, positions: Int[Array, "B T"]) -> Recent:
    """Positions with those of this call, whose keys and values are written behind `used` tokens."""
    if positions.shape[1] != 1:
        raise ValueError(
            f"{positions.shape[1]} tokens a row were given with a cache that keeps a window (`keep_window`), which "
            "takes them one at a time"
        )
    at = recent.used % recent.positions.shape[1]
    return recent._replace(positions=jax.lax.dynamic_update_slice(recent.positions, positions, (0, at)))


def _layer_embeddings(params, tokens, x, config: TransformerConfig) -> Float[Array, "L B T P"] | None:
    """For every layer, the sum of a token's embedding and a projection of `x`, divided by sqrt(2)."""
    if config.per_layer is None:
        return None
    own = params["per_layer_embedding"].astype(x.dtype)[tokens] * jnp.asarray(config.per_layer.width**0.5, x.dtype)
    projected = project(x, params["per_layer_projection"]) * jnp.asarray(config.width**-0.5, x.dtype)
    projected = rms_norm(projected, params["per_layer_norm"], config.norm_epsilon, config.norm_offset)
    return jnp.moveaxis((projected + own) * jnp.asarray(2**-0.5, x.dtype), 2, 0)


def _unrolled_blocks(params, shared, x, router_choices, cache, keep):
    config = shared.config
    filled: list = []
    all_observed, routed = [], 0
    carried: Any = cache.pages if isinstance(cache, PagedCache) else None
    kinds = zip(config.stack_of_layer, config.windowed, config.rotated, strict=True)
    source = [config.caches[name][number] for name, number in cache_of_layer(config)]
    for index, (block_params, (stack, windowed, rotated)) in enumerate(
        zip(unstack(params, config)["blocks"], kinds, strict=True)
    ):
        choices = None
        if "router" in block_params:
            choices = None if router_choices is None else router_choices[routed]
            routed += 1
        cached, reads = None, source[index] != index
        if isinstance(cache, PagedCache):
            cached = PagedBlock(carried, cache.table, index * cache.pages_per_layer(config.layers))
        elif cache is not None:
            context = [(part.layers[source[index]], part.positions) for part in cache.context]
            cached = filled[source[index]] if reads else cache.layers[index], None, _readable(context, config)
        elif reads:
            cached = filled[source[index]], None, ()
        layer = Layer(windowed, rotated, reads, config.reading_layers > 0)
        run = run_block(shared.of_layer(stack, index), layer, cached, caching=cache is not None)
        x, carried, observed = run(block_params, x, choices)
        filled.append(carried)
        all_observed.append(jax.tree.map(lambda leaf: leaf[None], keep(observed)))
    layers = carried if isinstance(cache, PagedCache) else tuple(filled)
    return x, layers, _joined(all_observed)


def _readable(context: Sequence[tuple[KeysAndValues | None, Array]], config: TransformerConfig):
    """The part of the context that one block may read."""
    latent = config.latent
    pairs = [(pair if latent is None else latent_values(pair, latent.rank), seen) for pair, seen in context if pair]
    return tuple(KeyValues(pair.keys, pair.values, seen) for pair, seen in pairs)


def _joined(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Observed values of the blocks by name; a block may lack some."""
    names = {name for part in parts for name in part}
    return {name: jnp.concatenate([part[name] for part in parts if name in part]) for name in names}


def _scanned_blocks(params, shared, x, router_choices, cache, keep):
    config = shared.config
    # The cache is carried, not scanned over: each block writes its new slots in place, and nothing is copied.
    carried: Any = cache.pages if isinstance(cache, PagedCache) else None
    carried = _by_kind(cache.layers) if isinstance(cache, Cache) else carried
    if cache is None and config.reading_layers:  # the last keys and values of each kind, for those that read them
        rows, length = shared.positions.shape
        empty = init_cache(rows, length, config=replace(config, cache_dtype="compute")).layers
        carried = {name: jax.tree.map(lambda leaf: leaf[0], entry) for name, entry in empty.items()}
    all_observed = []
    for run, blocks in zip(layer_runs(config), in_runs(params, config)["runs"], strict=True):
        (x, carried), observed = _run(blocks, run, shared, (x, carried), router_choices, cache, keep)
        all_observed.append(observed)
    if isinstance(cache, Cache) and not isinstance(cache.layers, dict):
        carried = carried["blocks"]
    return x, None if cache is None else carried, _joined(all_observed)


def _by_kind(layers: Any) -> Any:
    """Layers of a cache by the names of `TransformerConfig.caches`."""
    return layers if isinstance(layers, dict) else {"blocks": layers}


def _run(blocks, run: Run, shared, carry, router_choices, cache, keep):
    """One scan over layers of which every `run.period` are alike."""
    config = shared.config
    kinds = [run.every(values) for values in (config.windowed, config.rotated)]

    def body(carry, xs):
        x: Array = carry[0]
        carried: Any = carry[1]
        blocks, number, choices, own = xs
        observed = []
        for j, place in enumerate(run.places):
            block = jax.tree.map(lambda leaf, at=place.in_stack: leaf[at], blocks[place.stack])
            block = _with_stack_sharding(block, config, place.stack)
            # Where all layers are of one kind, the program knows it; else each reads its own from an array.
            windowed, rotated = (
                each[j][0] if len(set(each[j])) == 1 else one[j] for each, one in zip(kinds, own, strict=True)
            )
            chosen = None if choices is None or place.routed is None else choices[place.routed]
            layer = run.start + number * run.period + j
            reads, cached = not place.caches, None
            if isinstance(cache, PagedCache):
                cached = PagedBlock(carried, cache.table, layer * cache.pages_per_layer(config.layers))
            elif cache is None and reads:
                cached = carried[place.cache], None, ()
            if isinstance(cache, Cache):
                at = place.first_cached + number * place.caches
                context = [(_by_kind(part.layers)[place.cache], part.positions) for part in cache.context]
                context = [(None if pair is None else of_layer(pair, at), seen) for pair, seen in context]
                cached = carried[place.cache], at, _readable(context, config)
            kind = Layer(windowed, rotated, reads, config.reading_layers > 0)
            call = run_block(shared.of_layer(place.stack, layer), kind, cached, caching=cache is not None)
            x, filled, shown = call(block, x, chosen)
            # Layers that read the cache of another have written nothing.
            carried = filled if not isinstance(carried, dict) else carried | ({} if reads else {place.cache: filled})
            observed.append(keep(shown))
        return (x, carried), _joined([jax.tree.map(lambda leaf: leaf[None], one) for one in observed])

    choices = None if router_choices is None or not run.routed else run.cut(router_choices, run.routed)
    own = [jnp.asarray(values).T for values in kinds]
    carry, observed = jax.lax.scan(body, carry, (blocks, jnp.arange(run.repeats), choices, own))
    return carry, {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in observed.items()}


def _with_stack_sharding(block_params, config: TransformerConfig, stack: str):
    """Parameters of one block of a scan, with the sharding that they have in the stack, also for their gradients.

    Without this the compiler sums a gradient over all devices in each iteration, and then keeps only a part of it.
    """
    specs = transformer_specs(config)[stack]

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
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | PagedCache | None]:
    """Hidden states after the final norm; the cached and the uncached pass are this one function.

    Args:
      params: as `transformer_specs` describes, or `for_decoding`.
      tokens: token ids; ids at padding positions are read and ignored.
      positions: index of each token in its own sequence, -1 for padding.
      cache: None, or a cache whose next T slots are filled with this call's keys and values.
      config: sizes and switches.
      router_choices: experts recorded by an earlier `observed_forward`, taken again instead of the router's.
      segments: number of the sequence that each token belongs to, where rows hold several sequences one behind the
        other (packed rows); their positions start at 0 in each. None where a row is one sequence.

    Returns:
      hidden states in the compute dtype, and the filled cache (None when none was given).
    """
    given = {"config": config, "router_choices": router_choices, "segments": segments}
    return observed_forward(params, tokens, positions, cache, **given)[:2]


def attention_path(config: TransformerConfig, *, queries: int, keys: int | None = None) -> AttentionKind:
    """The attention path of this model for `queries` query tokens per row and `keys` key slots (default: as many)."""
    return attention_in_use(
        "plain" if config.plain_attention else config.attention,
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
    blocks = {
        layer: jax.tree.map(lambda leaf, index=index: leaf[index], params[stack])
        for stack, layers in config.stacks.items()
        for index, layer in enumerate(layers)
    }
    blocks = tuple(blocks[layer] for layer in range(config.layers))
    return {name: leaf for name, leaf in params.items() if name not in config.stacks} | {"blocks": blocks}


def for_decoding(params: PyTree, config: TransformerConfig) -> PyTree:
    """Parameters laid out for many small steps: unstacked, and on a CPU with their large matrices `Turned`; blocks that
    are scanned over are cut into their runs, which each step would copy otherwise."""
    if not config.unrolled:
        return in_runs(params, config)
    params = unstack(params, config)
    split = (ambient := ambient_layout()) is not None and ambient.mesh.size > 1
    if backend_in_use() != "cpu" or split:
        return params

    def laid_out(block):
        inputs = {"qkv": 1, "query_up": 1, "attention_out": 3, "delta_in": 1, "delta_out": 3} | (
            {} if "router" in block else {"gate_up": 1, "down": 1}
        )
        large = {
            name: turned(matrix, inputs=count)
            for name, count in inputs.items()
            if isinstance(matrix := block.get(name), jax.Array) and matrix.size >= TURNED_FROM
        }
        return block | large

    return params | {"blocks": tuple(laid_out(block) for block in params["blocks"])}


def logits(
    params: PyTree, hidden: Float[Array, "*B D"], *, cap: float | None = None, divisor: float = 1.0
) -> Float[Array, "*B V"]:
    """Scores of the next symbol over `divisor`, float32, before temperature; with a cap, cap * tanh(scores / cap)."""
    table = params.get("unembedding", params["embedding"]).astype(hidden.dtype)
    scores = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    # Scores move on to where they are drawn from; the table stays where it is.
    scores = constrain(scores, "rows", *[ANY] * (scores.ndim - 2), "vocabulary") if scores.ndim > 1 else scores
    scores = scores if divisor == 1.0 else scores / divisor
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
        logits=partial(logits, cap=config.logits_cap, divisor=config.logits_divisor),
        init_cache=partial(init_cache, config=config),
        expand_cache=partial(expanded, config=config),
        for_decoding=partial(for_decoding, config=config),
        shared_scoring=_shared_scoring(config),
        take_rows=taken_rows,
        replace_row=replaced_row,
        cut_cache=None if config.delta is not None or in_pages(config) else cut_cache,
        keep_window=partial(keep_window, config=config),
        specs=specs,
        vocabulary_size=config.vocabulary_size,
        config=config,
        observe=partial(observed_forward, config=config),
        routed=config.experts is not None,
        packs=True,
    )
