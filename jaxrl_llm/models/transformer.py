"""A decoder-only transformer as pure functions: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import ParameterSpec, initialise

LayerLoop = Literal["auto", "unrolled", "scanned"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a decoder-only transformer.

    Attributes:
      vocabulary_size: symbols.
      width: of the residual stream.
      layers: blocks.
      heads: query heads.
      kv_heads: key/value heads; divides `heads`.
      head_width: of one head, even; None gives width / heads.
      mlp_width: hidden width of SwiGLU; None gives 3 * width.
      rope_base: base of the rotary angles.
      norm_epsilon: inside the root of RMSNorm.
      qk_norm: RMSNorm on each query and key head before rotation.
      tie_embeddings: the embedding table is also the output projection.
      layer_loop: "unrolled" is about twice as fast on CPU, "scanned" compiles once for any depth; "auto"
        unrolls on CPU.
      parameter_dtype: storage dtype.
      compute_dtype: dtype of matrix products; norms, softmax and statistics are float32 regardless.
    """

    vocabulary_size: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int | None = None
    mlp_width: int | None = None
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    qk_norm: bool = True
    tie_embeddings: bool = True
    layer_loop: LayerLoop = "auto"
    parameter_dtype: Precision = "float32"
    compute_dtype: Precision = "float32"

    def __post_init__(self):
        for name in ("vocabulary_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"model.{name} is {size}; it must be at least 1")
        choices = {"layer_loop": LayerLoop, "parameter_dtype": Precision, "compute_dtype": Precision}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                known = ", ".join(get_args(literal))
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; it must be one of {known}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads is {self.heads}, which model.kv_heads {self.kv_heads} does not divide")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.width is {self.width}, which model.heads {self.heads} does not divide; set model.head_width"
            )
        if self.head_size % 2:
            raise ValueError(f"model.head_width is {self.head_size}; rotary positions need an even number")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def unrolled(self) -> bool:
        """Whether blocks are written out one after the other."""
        return self.layer_loop == "unrolled" or (self.layer_loop == "auto" and jax.default_backend() == "cpu")


class Cache(NamedTuple):
    """Keys and values seen so far, head-major.

    Attributes:
      layers: (keys, values), each [B, K, S, H]: a tuple with one pair a block when unrolled, one pair with a leading
        layer axis when scanned.
      positions: position of the token in each slot, -1 where the slot is empty or padding.
      used: slots written so far, the same for all rows (prompts are left-padded).
    """

    layers: PyTree
    positions: Int[Array, "B S"]
    used: Int[Array, ""]


def transformer_specs(config: TransformerConfig) -> dict:
    """Describe every parameter. Blocks are stacked on a leading axis.

    Query, key and value projections are one matrix, grouped by key/value head, so that one product computes them
    and a split over key/value heads keeps every group whole. Gate and up are one matrix likewise.
    """
    c, layers = config, config.layers
    mlp_width = c.mlp_width or 3 * c.width
    into, out_scale = c.width**-0.5, (2 * layers) ** -0.5
    spec = partial(ParameterSpec, dtype=jnp.dtype(c.parameter_dtype))
    block = {
        "attention_norm": spec((layers, c.width), ("layer", None), 0.0),
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
        "mlp_norm": spec((layers, c.width), ("layer", None), 0.0),
        "gate_up": spec((layers, c.width, 2, mlp_width), ("layer", "embed", None, "mlp"), into),
        "down": spec((layers, mlp_width, c.width), ("layer", "mlp", "embed"), out_scale * mlp_width**-0.5),
    }
    if c.qk_norm:
        block["query_norm"] = spec((layers, c.head_size), ("layer", None), 0.0)
        block["key_norm"] = spec((layers, c.head_size), ("layer", None), 0.0)
    specs = {
        "embedding": spec((c.vocabulary_size, c.width), ("vocabulary", "embed"), into),
        "blocks": block,
        "final_norm": spec((c.width,), (None,), 0.0),
    }
    if not c.tie_embeddings:
        specs["unembedding"] = spec((c.vocabulary_size, c.width), ("vocabulary", "embed"), into)
    return specs


def project(x: Float[Array, "*B *I"], weights: Float[Array, "*I *O"], *, inputs: int = 1) -> Float[Array, "*B *O"]:
    """Contract the last `inputs` axes of x with the first ones of `weights`.

    Written as one product of two matrices: the backward pass of the equivalent einsum takes several times as long on
    a CPU, where only plain matrices reach the fast kernels.
    """
    rows = math.prod(x.shape[-inputs:])
    product = x.reshape(-1, rows) @ weights.reshape(rows, -1)
    return product.reshape(*x.shape[:-inputs], *weights.shape[inputs:])


def rms_norm(x: Float[Array, "*B D"], gain: Float[Array, "D"], epsilon: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * gain, in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normed * gain.astype(jnp.float32)).astype(x.dtype)


def rotary_angles(positions: Int[Array, "B T"], head_size: int, base: float) -> tuple[Array, Array]:
    """Cosine and sine [B, T, H/2] of position * base^(-2i/H), in float32."""
    frequencies = base ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T K G H"], angles: tuple[Array, Array]) -> Float[Array, "B T K G H"]:
    """Rotate pairs (i, i + H/2) of each head by the angle of the token's position."""
    cos, sin = (a[:, :, None, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    allowed: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
    """Softmax attention with G query heads to each key/value head; scores and softmax in float32.

    A query that may attend to nothing (padding) returns a finite mean that nobody reads.
    """
    scores = jnp.einsum("btkgh,bksh->bkgts", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed[:, None, None], scores * queries.shape[-1] ** -0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", weights, values)


def _remembered(cached, keys, values, used):
    """Write new keys and values into a cache; returns (the cache, all keys, all values) of this block."""
    *stored, layer = cached
    at = (0, 0, used, 0) if layer is None else (layer, 0, 0, used, 0)
    new = (keys, values) if layer is None else (keys[None], values[None])
    filled = tuple(
        jax.lax.dynamic_update_slice(leaf, update.astype(leaf.dtype), at)
        for leaf, update in zip(stored, new, strict=True)
    )
    keys, values = filled if layer is None else (leaf[layer] for leaf in filled)
    return filled, keys, values


def _block(params, config: TransformerConfig, x, angles, allowed, cached, used):
    """One block. `cached` is None or (keys, values, layer), written from slot `used` on.

    Keys and values are [B, K, S, H] where `layer` is None, else [L, B, K, S, H], of which this block is entry `layer`.
    """
    rows, length, _ = x.shape
    dtype = x.dtype
    projected = project(rms_norm(x, params["attention_norm"], config.norm_epsilon), params["qkv"].astype(dtype))
    queries, keys, values = projected[..., :-2, :], projected[..., -2:-1, :], projected[..., -1, :]
    if config.qk_norm:
        queries = rms_norm(queries, params["query_norm"], config.norm_epsilon)
        keys = rms_norm(keys, params["key_norm"], config.norm_epsilon)
    queries, keys = rotate(queries, angles), rotate(keys, angles)[..., 0, :]
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    filled = None
    if cached is not None:
        filled, keys, values = _remembered(cached, keys, values, used)
    attended = attend(queries, keys, values, allowed)
    x = x + project(attended, params["attention_out"].astype(dtype), inputs=3)
    gate_up = project(rms_norm(x, params["mlp_norm"], config.norm_epsilon), params["gate_up"].astype(dtype))
    activated = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
    x = x + project(activated, params["down"].astype(dtype))
    return x, filled


def forward(
    params: PyTree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache | None = None,
    *,
    config: TransformerConfig,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Hidden states after the final norm; the cached and the uncached pass are this one function.

    Args:
      params: as `transformer_specs` describes; `blocks` may also be a tuple with one tree a block (see `unstack`).
      tokens: token ids; ids at padding positions are read and ignored.
      positions: index of each token in its own sequence, -1 for padding.
      cache: None, or a cache whose next T slots are filled with this call's keys and values.
      config: sizes and switches.

    Returns:
      hidden states in the compute dtype, and the filled cache (None when none was given).
    """
    x = params["embedding"].astype(config.compute_dtype)[tokens]
    angles = rotary_angles(positions, config.head_size, config.rope_base)
    used = jnp.int32(0) if cache is None else cache.used
    seen = positions
    if cache is not None:
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, used))
    allowed = (seen[:, None, :] <= positions[:, :, None]) & (seen[:, None, :] >= 0)

    block = partial(_block, config=config, angles=angles, allowed=allowed, used=used)
    layers = None if cache is None else cache.layers
    if config.unrolled:
        filled = []
        for index, block_params in enumerate(unstack(params, config)["blocks"]):
            x, layer = block(block_params, x=x, cached=None if layers is None else (*layers[index], None))
            filled.append(layer)
        layers = tuple(filled)
    else:
        # The cache is carried, not scanned over: each block writes its new slots in place, and nothing is copied.
        def body(carry, xs):
            x, layers = carry
            return block(xs[0], x=x, cached=None if layers is None else (*layers, xs[1])), None

        (x, layers), _ = jax.lax.scan(body, (x, layers), (params["blocks"], jnp.arange(config.layers)))
    hidden = rms_norm(x, params["final_norm"], config.norm_epsilon)
    return hidden, None if cache is None else Cache(layers, seen, used + tokens.shape[1])


def unstack(params: PyTree, config: TransformerConfig) -> PyTree:
    """Split stacked blocks into a tuple when they are unrolled, so that a decode loop does not slice at every token."""
    if not config.unrolled or isinstance(params["blocks"], tuple):
        return params
    blocks = tuple(jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(config.layers))  # noqa: B023
    return params | {"blocks": blocks}


def logits(params: PyTree, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Scores of the next symbol in float32, before temperature."""
    table = params.get("unembedding", params["embedding"]).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def init_cache(rows: int, slots: int, *, config: TransformerConfig) -> Cache:
    """An empty cache for `slots` tokens a row."""
    shape = (rows, config.kv_heads, slots, config.head_size)
    if not config.unrolled:
        shape = (config.layers, *shape)
    pair = lambda: (jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))  # noqa: E731
    layers = tuple(pair() for _ in range(config.layers)) if config.unrolled else pair()
    return Cache(layers, jnp.full((rows, slots), -1, jnp.int32), jnp.int32(0))


def expand_cache(cache: Cache, samples: int, extra_slots: int) -> Cache:
    """Repeat each row `samples` times and add `extra_slots` empty slots: one prefill serves a whole group."""

    def expand(leaf):
        leaf = jnp.repeat(leaf, samples, axis=leaf.ndim - 4)
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, extra_slots), (0, 0)])

    positions = jnp.repeat(cache.positions, samples, axis=0)
    positions = jnp.pad(positions, [(0, 0), (0, extra_slots)], constant_values=-1)
    return Cache(jax.tree.map(expand, cache.layers), positions, cache.used)


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
        logits=logits,
        init_cache=partial(init_cache, config=config),
        expand_cache=expand_cache,
        specs=specs,
        vocabulary_size=config.vocabulary_size,
        config=config,
    )
