"""One block of the transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP or experts.

`TransformerConfig` holds the differences between families.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.adapters import plain_matrix
from jaxrl_llm.models.attention import AttentionKind, KeyValues, attend
from jaxrl_llm.models.cache import KeysAndValues, Recent, Windowed, of_layer, remembered, stored_at
from jaxrl_llm.models.delta import delta_mixed
from jaxrl_llm.models.experts import expert_mlp, route
from jaxrl_llm.models.latent import NORM_EPSILON, latent_mixed, latent_queries_and_keys, latent_values
from jaxrl_llm.models.paged import PagedBlock, paged_attention, written
from jaxrl_llm.models.projection import project
from jaxrl_llm.models.rematerialisation import ATTENDED, rematerialised
from jaxrl_llm.models.rotary import rotate
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.parallel.rules import constrain

# Factor in the sigmoid of clamped_swiglu, which makes it similar to a gelu.
_SWIGLU_GAIN = 1.702


class Shared(NamedTuple):
    """Inputs that all blocks of one forward pass share.

    Attributes:
      config: sizes and switches.
      angles: rotary angles; `local_angles` are those of windowed layers, None if they are the same.
      growth: factor on the queries, [B, T]; None is 1.
      positions: of the tokens of this call, [B, T].
      seen: of the keys, [B, S].
      used: tokens written into the cache before this call.
      kind: the attention path.
      per_layer: embeddings of a layer, or of all with a leading axis; None without.
      segments: of packed rows, the sequence that each token belongs to, [B, T]; None where a row is one sequence.
      recent: `seen` and `used` of layers that keep their window alone, [B, W]; None where none does.
    """

    config: TransformerConfig
    angles: tuple[Array, Array]
    local_angles: tuple[Array, Array] | None
    growth: Float[Array, "B T"] | None
    positions: Int[Array, "B T"]
    seen: Int[Array, "B S"]
    used: Int[Array, ""]
    kind: AttentionKind
    per_layer: Float[Array, "... B T P"] | None = None
    segments: Int[Array, "B T"] | None = None
    recent: Recent | None = None

    def where(self, stored: Any) -> tuple[Int[Array, "B S"], Int[Array, ""]]:
        """(positions of the keys, tokens written before) of the cache of one block."""
        if isinstance(stored, Windowed):
            assert self.recent is not None
            return self.recent
        return self.seen, self.used

    def of_layer(self, stack: str, layer: Array | int) -> Shared:
        """The shared inputs of one block."""
        per_layer = None if self.per_layer is None else self.per_layer[layer]
        return self._replace(config=self.config.of_stack(stack), per_layer=per_layer)


class Layer(NamedTuple):
    """Differences between the blocks of a model; entries are arrays if blocks of both kinds are scanned.

    Attributes:
      windowed: it attends to the window only.
      rotated: queries and keys are rotated.
      reads: it attends to the keys and values of another layer, which are passed as its cache.
      lends: it returns its keys and values if there is no cache.
    """

    windowed: bool | Array
    rotated: bool | Array
    reads: bool = False
    lends: bool = False


def rms_norm(
    x: Float[Array, "*B D"], gain: Float[Array, "D"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * (gain + offset), in float32, returned in the dtype of x."""
    wide, gain = x.astype(jnp.float32), gain.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normed * (gain + offset if offset else gain)).astype(x.dtype)


def _head_norm(x: Float[Array, "B T K G H"], gain: Array, norm) -> Float[Array, "B T K G H"]:
    """`norm` over each head, or over all heads if the gain has an entry for each."""
    if gain.ndim == 1:
        return norm(x, gain)
    return norm(x.reshape(*x.shape[:2], -1), gain.reshape(-1)).reshape(x.shape)


def _rotated(shared: Shared, layer: Layer, x: Float[Array, "B T K G H"]) -> Float[Array, "B T K G H"]:
    """Queries or keys, rotated by the angles of this layer."""
    if layer.rotated is False:
        return x
    angles = shared.angles
    if shared.local_angles is not None:
        if isinstance(layer.windowed, bool):
            angles = shared.local_angles if layer.windowed else angles
        else:
            angles = jax.tree.map(partial(jnp.where, layer.windowed), shared.local_angles, angles)
    turned = rotate(x, angles, interleaved=shared.config.rope_interleaved)
    return turned if layer.rotated is True else jnp.where(layer.rotated, turned, x)


def _projected(params, shared: Shared, x, layer: Layer, norm) -> tuple[Array, Array | None, Any]:
    """Queries, their gates, and keys and values in cache layout; None for a layer that reads those of another."""
    config, dtype = shared.config, x.dtype
    x = norm(x, params["attention_norm"]) if config.pre_norms else x
    rotated, gates = partial(_rotated, shared, layer), None
    if config.latent is not None:
        of_latents = partial(rms_norm, epsilon=NORM_EPSILON)
        queries, keys = latent_queries_and_keys(params, x, config.latent, of_latents, rotated)
        values = keys[..., :0]
    else:
        projected = project(x, params["qkv"])
        if config.qkv_bias:
            projected = projected + params["qkv_bias"].astype(dtype)
        asked = config.queries_per_kv * (2 if config.attention_gate else 1)
        # If one projection makes keys and values, the last slot is both.
        queries, keys, values = projected[..., :asked, :], projected[..., asked : asked + 1, :], projected[..., -1, :]
        if config.attention_gate:
            queries, gates = queries[..., ::2, :], queries[..., 1::2, :]
        queries = rotated(_head_norm(queries, params["query_norm"], norm) if config.qk_norm else queries)
        if not layer.reads:
            keys = rotated(_head_norm(keys, params["key_norm"], norm) if config.qk_norm else keys)[..., 0, :]
        if config.value_norm:
            values = rms_norm(values, jnp.ones((), jnp.float32), config.norm_epsilon)
    if shared.growth is not None:
        queries = queries * shared.growth[..., None, None, None].astype(dtype)
    if layer.reads:
        return constrain(queries, "rows", "positions", "kv_heads"), gates, None
    # Each device holds the queries of its own positions; the keys and values of all are gathered (context parallelism).
    new = KeysAndValues(
        constrain(keys.transpose(0, 2, 3, 1), "rows", "kv_heads", None, None),
        constrain(values.swapaxes(1, 2), "rows", "kv_heads", None),
    )
    return constrain(queries, "rows", "positions", "kv_heads"), gates, new


def _attention(params, shared: Shared, x, layer: Layer, cached):
    """The attention output for the residual stream, and the filled cache of this block."""
    config, dtype, latent = shared.config, x.dtype, shared.config.latent
    norm = partial(rms_norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    if "delta_in" in params:
        return _delta(params, shared, norm(x, params["attention_norm"]), cached)
    queries, gates, new = _projected(params, shared, x, layer, norm)
    scores = {
        "scale": config.score_scale,
        "window": config.window,
        "windowed": layer.windowed,
        "cap": config.attention_cap,
    }
    filled, context, seen = None, (), shared.seen
    if layer.reads:
        stored, index, context = cached
        new, (seen, _) = of_layer(stored, index), shared.where(stored)
    elif cached is None and layer.lends:
        filled = new
    if isinstance(cached, PagedBlock):
        filled = written(cached, shared.positions, new)
        attended = paged_attention(queries, cached._replace(pages=filled), shared.positions, **scores)
    else:
        if cached is not None and not layer.reads:
            stored, index, context = cached
            seen, used = shared.where(stored)
            filled = remembered(stored, index, new, used, seen.shape[1])
            # A pass that fills its whole cache has just computed the content of the cache.
            new = new if shared.kind != "plain" else of_layer(filled, index)
        new = new if latent is None else latent_values(new, latent.rank)
        own = KeyValues(new.keys, new.values, seen)
        sinks = params["sinks"] if config.attention_sinks else None
        scores |= {"sinks": sinks, "kind": shared.kind, "segments": shared.segments}
        attended = attend(queries, own, shared.positions, context, **scores)
    attended = attended if latent is None else latent_mixed(params, attended, latent)
    attended = attended if gates is None else attended * jax.nn.sigmoid(gates)
    added = project(checkpoint_name(attended, ATTENDED), params["attention_out"], inputs=3)
    if config.attention_out_bias:
        added = added + params["attention_out_bias"].astype(dtype)
    return norm(added, params["attention_post_norm"]) if config.post_norms else added, filled


def _delta(params, shared: Shared, x, cached):
    """The same for a gated delta-net layer, which has no attention."""
    config = shared.config
    assert config.delta is not None
    stored, index, _ = (None, None, ()) if cached is None else cached
    before = None if stored is None else of_layer(stored, index)
    given = params, x, shared.positions, before, config.delta
    added, after = delta_mixed(*given, epsilon=config.norm_epsilon, segments=shared.segments)
    return added, None if stored is None else stored_at(stored, index, after)


def gated_activation(config: TransformerConfig) -> Callable[[Array, Array], Array]:
    """(gate, up) -> the input of the down projection."""
    if config.activation == "clamped_swiglu":
        limit = config.activation_limit

        def clamped(gate, up):
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return gate * jax.nn.sigmoid(_SWIGLU_GAIN * gate) * (up + 1)

        return clamped
    silu = config.activation == "silu"
    activation = jax.nn.silu if silu else partial(jax.nn.gelu, approximate=config.activation == "gelu_tanh")
    return lambda gate, up: activation(gate) * up


def _dense_mlp(params, prefix: str, x, gated):
    """down(gated(gate(x), up(x))) with the matrices of this prefix, and biases if there are any."""
    gate_up = project(x, params[f"{prefix}gate_up"])
    if f"{prefix}gate_up_bias" in params:
        gate_up = gate_up + params[f"{prefix}gate_up_bias"].astype(x.dtype)
    added = project(gated(gate_up[..., 0, :], gate_up[..., 1, :]), params[f"{prefix}down"])
    bias = params.get(f"{prefix}down_bias")
    return added if bias is None else added + bias.astype(x.dtype)


def _mlp(params, config: TransformerConfig, x, choices):
    """The output of the MLP or the mixture of experts for the residual stream, and the router's results."""
    norm = partial(rms_norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    gated, observed = gated_activation(config), {}
    normed = norm(x, params["mlp_norm"]) if config.pre_norms else x
    if "router" not in params:
        added = _dense_mlp(params, "", normed, gated)
    else:
        experts, dtype = config.experts, x.dtype
        assert experts is not None
        asked, served = normed, normed
        if experts.own_norms:
            asked = rms_norm(x, params["router_gain"] * config.width**-0.5, config.norm_epsilon)
            served = norm(x, params["experts_norm"])
        given = {"bias": "router_bias", "selection_bias": "selection_bias", "factor": "expert_factor"}
        router = params["router"] if experts.scores == "sigmoid" else params["router"].astype(dtype)
        routing = route(asked, router, experts, choices, **{name: params.get(leaf) for name, leaf in given.items()})
        names = ["gate_up", "down"] + ["gate_up_bias", "down_bias"] * config.mlp_bias
        matrices = {name: plain_matrix(params[name], dtype) for name in names}
        added = expert_mlp(served, routing, gated=gated, ragged=experts.ragged, **matrices)
        if experts.own_norms:
            added = norm(added, params["experts_post_norm"])
        if experts.shared_width is not None:
            shared = _dense_mlp(params, "shared_", normed, gated)
            gate = jax.nn.sigmoid(project(normed, params["shared_gate"])) if experts.shared_gate else None
            shared = norm(shared, params["shared_post_norm"]) if experts.own_norms else shared
            added = added + (shared if gate is None else gate * shared)
        observed = {"router_choices": routing.choices, "router_probabilities": routing.probabilities}
    return norm(added, params["mlp_post_norm"]) if config.post_norms else added, observed


def _block(params, shared: Shared, x, layer: Layer, choices, cached):
    """One block: (residual stream, filled cache, observable values).

    `cached` is None, or what is being written (see `remembered`), `layer`, and the context of this block; or its pages.
    """
    scale = shared.config.residual_scale
    scaled = lambda added: added if scale == 1.0 else added * jnp.asarray(scale, added.dtype)  # noqa: E731
    added, filled = _attention(params, shared, x, layer, cached)
    x = constrain(x + scaled(added), "rows", "positions", None)
    added, observed = _mlp(params, shared.config, x, choices)
    x = constrain(x + scaled(added), "rows", "positions", None)
    if shared.per_layer is not None:
        x = x + _of_layer_embeddings(params, shared, x)
    if "layer_scale" in params:
        x = x * jax.lax.stop_gradient(params["layer_scale"]).astype(x.dtype)
    return x, filled, observed | {"hidden_states": x}


def _of_layer_embeddings(params, shared: Shared, x):
    """The contribution of the token's embedding for this layer, gated by the residual stream."""
    config = shared.config
    assert shared.per_layer is not None
    gated = gated_activation(config)(project(x, params["per_layer_gate"]), shared.per_layer)
    added = project(gated, params["per_layer_up"])
    return rms_norm(added, params["per_layer_post_norm"], config.norm_epsilon, config.norm_offset)


def run_block(shared: Shared, layer: Layer, cached, *, caching: bool):
    """`_block` as a function of what is differentiated; where nothing is cached it keeps what the config says."""

    def run(params, x, choices):
        return _block(params, shared, x, layer, choices, cached)

    return run if caching else rematerialised(run, shared.config.remat)
