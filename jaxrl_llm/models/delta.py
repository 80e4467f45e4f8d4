"""Gated delta-net layers: the state is one matrix per head instead of the keys and values of all tokens.

    S_t = e^(g_t) S_(t-1) + k_t (beta_t (v_t - (e^(g_t) S_(t-1))^T k_t))^T,    o_t = S_t^T q_t

Queries, keys and values go through a short convolution over the tokens of their row before. Padding changes neither
the state nor what the convolution sees, wherever it stands: the tokens of a row are moved together first.

Reference: Gated Delta Networks (arXiv 2412.06464); in chunks as in DeltaNet (arXiv 2406.06484).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.cache import Recurrent, empty_state
from jaxrl_llm.models.layer_kinds import DeltaConfig
from jaxrl_llm.models.projection import project
from jaxrl_llm.parallel.rules import constrain

# Tokens per chunk; the state is written once per chunk.
CHUNK = 64
_NORM_EPSILON = 1e-6
# A state is a sum over all earlier tokens; its products are float32 on every machine.
_product = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def delta_mixed(
    params: Mapping[str, Any],
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    before: Recurrent | None,
    delta: DeltaConfig,
    *,
    epsilon: float,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Recurrent]:
    """The output of the layer for the residual stream, and its new state.

    Args:
      params: of the block.
      x: normed input.
      positions: -1 for padding.
      before: the previous state; None at the start of rows.
      delta: sizes.
      epsilon: of the norm of its outputs.
      segments: of packed rows, the sequence that each token belongs to: state and convolution restart in each.
    """
    dtype, (rows, length, _) = x.dtype, x.shape
    x, real = constrain(x, "rows", None, None), positions >= 0
    order = None
    if length > 1:
        order = jnp.argsort(~real, axis=1, stable=True)
        x, real = jnp.take_along_axis(x, order[..., None], axis=1), jnp.take_along_axis(real, order, axis=1)
        segments = None if segments is None else jnp.take_along_axis(segments, order, axis=1)
    x = jnp.where(real[..., None], x, 0)
    mixed, gate = jnp.split(project(x, params["delta_in"]), [delta.mixed_width], axis=-1)
    before = empty_state(rows, delta, dtype) if before is None else before
    seen = jnp.concatenate([before.inputs, mixed.astype(before.inputs.dtype)], axis=1)
    last = real.sum(axis=1)[:, None] + jnp.arange(delta.kernel - 1)
    inputs = jnp.take_along_axis(seen, last[..., None, None], axis=1)

    kernel, wide = params["delta_conv"][:, :, 0].astype(jnp.float32), seen.astype(jnp.float32)
    taps = (_own_taps(wide[:, i : i + length], segments, delta.kernel - 1 - i) for i in range(delta.kernel))
    mixed = jax.nn.silu(sum(tap * kernel[..., i] for i, tap in enumerate(taps)))
    queries, keys, values = jnp.split(mixed, [delta.key_width, 2 * delta.key_width], axis=-1)
    queries, keys = _unit(queries) * delta.key_width**-0.5, _unit(keys)
    values = values.reshape(*values.shape[:-1], delta.values_per_key, delta.value_width)
    strength, rate = jnp.split(project(x, params["delta_gates"]).astype(jnp.float32), 2, axis=-1)
    pace = jnp.exp(params["delta_decay"].astype(jnp.float32))
    decay = -pace * jax.nn.softplus(rate + params["delta_rate"].astype(jnp.float32))
    real = real[..., None, None]
    arguments = queries, keys, values, jnp.where(real, decay, 0.0), jnp.where(real, jax.nn.sigmoid(strength), 0.0)
    if length == 1:
        out, state = recurrent_delta(*arguments, before.state)
    else:
        out, state = chunked_delta(*arguments, before.state, segments=segments)

    gain, gate = params["delta_norm"].astype(jnp.float32), gate.reshape(out.shape).astype(jnp.float32)
    out = out * jax.lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + epsilon) * gain * jax.nn.silu(gate)
    added = project(out.astype(dtype), params["delta_out"], inputs=3)
    if order is not None:
        added = jnp.take_along_axis(added, jnp.argsort(order, axis=1)[..., None], axis=1)
    after = Recurrent(constrain(inputs, "rows", None, "kv_heads"), constrain(state, "rows", "kv_heads"))
    return constrain(added, "rows", "positions", None), after


def _where(condition: Array | None, x: Array) -> Array:
    return x if condition is None else jnp.where(condition, x, 0.0)


def _own_taps(tap: Float[Array, "B T *M"], segments: Int[Array, "B T"] | None, behind: int) -> Float[Array, "B T *M"]:
    """What the convolution sees so many tokens behind each, and zero where that is of another sequence."""
    if segments is None or behind == 0:
        return tap
    before = jnp.pad(segments, [(0, 0), (behind, 0)], constant_values=-1)[:, : segments.shape[1]]
    own = (before == segments).reshape(*segments.shape, *[1] * (tap.ndim - 2))
    return jnp.where(own, tap, 0.0)


def _unit(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _NORM_EPSILON)


def recurrent_delta(
    queries: Float[Array, "B T K H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K G W"],
    decay: Float[Array, "B T K G"],
    strength: Float[Array, "B T K G"],
    state: Float[Array, "B K G H W"],
) -> tuple[Float[Array, "B T K G W"], Float[Array, "B K G H W"]]:
    """(o, the last state) token by token: the definition.

    Args:
      queries, keys: q and k, float32 like the rest; G values share one.
      values: v.
      decay: g, at most 0.
      strength: beta, in [0, 1]; with 0, and decay 0, a token changes nothing.
      state: S before.
    """

    def step(state, token):
        query, key, value, decay, strength = token
        state = state * jnp.exp(decay)[..., None, None]
        key, query = key[:, :, None, :, None], query[:, :, None, :, None]
        correction = strength[..., None] * (value - jnp.sum(state * key, axis=-2))
        state = state + key * correction[..., None, :]
        return state, jnp.sum(state * query, axis=-2)

    tokens = queries, keys, values, decay, strength
    if queries.shape[1] == 1:
        state, out = step(state, tuple(x[:, 0] for x in tokens))
        return out[:, None], state
    state, out = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in tokens))
    return out.swapaxes(0, 1), state


def chunked_delta(
    queries: Float[Array, "B T K H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K G W"],
    decay: Float[Array, "B T K G"],
    strength: Float[Array, "B T K G"],
    state: Float[Array, "B K G H W"],
    *,
    chunk: int = CHUNK,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T K G W"], Float[Array, "B K G H W"]]:
    """The same as matrix products, with the state written once per chunk.

    Within a chunk the corrections u_i = beta_i (v_i - what the state says of k_i) solve a triangular system, with
    c the running sum of the decay:

        u_i + sum_(j < i) beta_i e^(c_i - c_j) (k_i . k_j) u_j = beta_i (v_i - e^(c_i) S^T k_i)

    Args:
      queries, keys, values, decay, strength, state: as for `recurrent_delta`.
      chunk: tokens of a chunk.
      segments: the sequence that each token belongs to, where a row holds several: S is 0 at the start of each. None
        where a row is one sequence that `state` belongs to.
    """
    batch, length = queries.shape[:2]
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def cut(x: Array, heads: int) -> Array:
        """[B, T, heads, ...] as [N, B, heads, C, ...]; padding at the end has no effect."""
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        x = jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)
        return jnp.moveaxis(x, 2, 2 + heads)

    queries, keys = cut(queries, 1), cut(keys, 1)
    values, decay, strength = cut(values, 2), cut(decay, 2), cut(strength, 2)
    total = jnp.cumsum(decay, axis=-1)
    earlier = jnp.tril(jnp.ones((chunk, chunk), bool))
    goes_on = left_over = None
    if segments is not None:
        # The state belongs to the sequence of the last token before the chunk: of other sequences nothing is read.
        own = jnp.pad(segments, [(0, 0), (0, count * chunk - length)], mode="edge")
        own = own.reshape(batch, count, chunk).swapaxes(0, 1)[:, :, None, None]
        before = jnp.concatenate([own[:1, ..., :1], own[:-1, ..., -1:]])
        goes_on, left_over = own == before, own == own[..., -1:]
        earlier = earlier & (own[..., :, None] == own[..., None, :])
    between = jnp.exp(jnp.where(earlier, total[..., :, None] - total[..., None, :], -jnp.inf))
    alike = _product("nbkih,nbkjh->nbkij", keys, keys)[:, :, :, None] * between * strength[..., None]
    read = _product("nbkih,nbkjh->nbkij", queries, keys)[:, :, :, None] * between
    known = _where(goes_on, strength * jnp.exp(total))[..., None] * keys[:, :, :, None]
    right = jnp.concatenate([strength[..., None] * values, known], axis=-1)
    # The diagonal is not read.
    solved = jax.lax.linalg.triangular_solve(alike, right, left_side=True, lower=True, unit_diagonal=True)
    fresh, known = jnp.split(solved, [values.shape[-1]], axis=-1)

    def over(state, part):
        queries, keys, total, read, fresh, known, goes_on, left_over = part
        correction = fresh - _product("bkgih,bkghw->bkgiw", known, state)
        asked = _where(goes_on, jnp.exp(total))[..., None] * queries[:, :, None]
        out = _product("bkgih,bkghw->bkgiw", asked, state) + _product("bkgij,bkgjw->bkgiw", read, correction)
        left = _where(left_over, jnp.exp(total[..., -1:] - total))[..., None] * keys[:, :, None]
        kept = _where(goes_on, jnp.exp(total))[..., -1]
        state = state * kept[..., None, None] + _product("bkgih,bkgiw->bkghw", left, correction)
        return state, out

    state, out = jax.lax.scan(over, state, (queries, keys, total, read, fresh, known, goes_on, left_over))
    out = jnp.moveaxis(jnp.moveaxis(out, 4, 2), 0, 1)
    return out.reshape(batch, count * chunk, *out.shape[3:])[:, :length], state
