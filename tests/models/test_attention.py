"""Every way to compute attention against the definition, with loops in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import TransformerConfig, attend, attention_in_use, transformer
from jaxrl_llm.models.attention import KeyValues, splash_attention, visible

pytestmark = pytest.mark.slow

ROWS, LENGTH, KV_HEADS, GROUP, SIZE = 3, 11, 2, 3, 8
SCALE = 0.7
# Left padding, right padding, both.
POSITIONS = np.stack([np.arange(11), np.r_[np.arange(7), [-1] * 4], np.r_[[-1] * 3, np.arange(6), [-1] * 2]])
REAL = POSITIONS >= 0


def inputs(length: int = LENGTH):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    shape = (ROWS, KV_HEADS, length, SIZE)
    return draw(ROWS, length, KV_HEADS, GROUP, SIZE), draw(*shape), draw(*shape)


def attended(queries, keys, values, positions, **options):
    return attend(queries, KeyValues(keys.swapaxes(-1, -2), values, positions), positions, **options)


def expected(queries, keys, values, positions, window, cap):
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    out = np.zeros_like(queries)
    for b, t, k, g in np.ndindex(queries.shape[:4]):
        own = positions[b, t]
        allowed = (positions[b] >= 0) & (positions[b] <= own) & (positions[b] > own - (window or 10**6))
        if own < 0:
            continue
        scores = SCALE * keys[b, k] @ queries[b, t, k, g]
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores) * allowed
        out[b, t, k, g] = weights @ values[b, k] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kind, cap", [("plain", None), ("plain", 1.5), ("xla", None)])
def test_whole_sequences_attend_as_defined(kind, cap, window):
    arrays, positions = inputs(), jnp.asarray(POSITIONS)
    ours = attended(*arrays, positions, scale=SCALE, window=window, cap=cap, kind=kind)
    assert bool(jnp.isfinite(ours).all())
    np.testing.assert_allclose(
        np.asarray(ours)[REAL], expected(*arrays, POSITIONS, window, cap)[REAL], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["plain", "xla", "splash"])
def test_packed_sequences_attend_to_themselves_alone(kind, window):
    # Sequences of 5, 4 and 2 tokens in one row, behind them two empty slots.
    lengths, empty = (5, 4, 2), 2
    queries, keys, values = (x[:1] for x in inputs(sum(lengths) + empty))
    positions = np.r_[tuple(np.arange(n) for n in lengths)], [-1] * empty
    positions = jnp.asarray(np.concatenate(positions))[None]
    segments = jnp.asarray(np.repeat(np.arange(4), (*lengths, empty)))[None]
    if kind == "splash":
        scaled = queries, keys, values, positions
        ours = splash_attention(*scaled, scale=SCALE, window=window, cap=None, segments=segments, interpret=True)
    else:
        ours = attended(queries, keys, values, positions, scale=SCALE, window=window, kind=kind, segments=segments)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        alone = queries[:, own], keys[:, :, own], values[:, :, own]
        theirs = expected(*alone, np.arange(length)[None], window, None)
        np.testing.assert_allclose(np.asarray(ours)[:, own], theirs, rtol=2e-5, atol=2e-5)
        start += length


@pytest.mark.parametrize("kind", ["plain", "xla"])
@pytest.mark.parametrize("windowed", [True, False])
def test_a_layer_may_learn_its_kind_from_an_array(kind, windowed):
    arrays, positions = inputs(), jnp.asarray(POSITIONS)
    run = jax.jit(partial(attended, scale=SCALE, window=3, kind=kind))
    ours = run(*arrays, positions, windowed=jnp.asarray(windowed))
    fixed = attended(*arrays, positions, scale=SCALE, window=3, windowed=windowed, kind=kind)
    np.testing.assert_allclose(np.asarray(ours)[REAL], np.asarray(fixed)[REAL], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(ours)[REAL],
        expected(*arrays, POSITIONS, 3 if windowed else None, None)[REAL],
        rtol=2e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_do_not_depend_on_the_way_and_ignore_padding(window):
    positions = jnp.asarray(POSITIONS)

    def loss(arrays, kind):
        out = attended(*arrays, positions, scale=SCALE, window=window, kind=kind)
        return jnp.sum(jnp.sin(out) * REAL[:, :, None, None, None])

    plain, xla = (jax.jit(jax.grad(partial(loss, kind=kind)))(inputs()) for kind in ("plain", "xla"))
    for one, other in zip(plain, xla, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(plain[0][~REAL], 0.0)
    np.testing.assert_array_equal(np.asarray(plain[1]).swapaxes(1, 2)[~REAL], 0.0)


@pytest.mark.parametrize("length, window, cap", [(11, None, None), (11, 4, 1.5), (130, 7, None)])
def test_the_splash_kernel_computes_the_same(length, window, cap):
    # In Pallas' interpreter; 130 tokens are two blocks, the second almost empty.
    arrays = inputs(length)
    positions = POSITIONS if length == LENGTH else np.stack([np.arange(length) - lead for lead in (0, 3, 129)])
    positions = np.maximum(positions, -1)
    seen = jnp.asarray(positions)
    plain = attended(*arrays, seen, scale=SCALE, window=window, cap=cap)
    ours = splash_attention(*arrays, seen, scale=SCALE, window=window, cap=cap, interpret=True)
    real = positions >= 0
    assert bool(jnp.isfinite(ours).all())
    np.testing.assert_allclose(np.asarray(ours)[real], np.asarray(plain)[real], rtol=2e-5, atol=2e-5)


def test_a_decode_step_sees_its_window_of_the_cache():
    seen = jnp.array([[-1, 0, 1, 2, 3, -1]])
    allowed = visible(jnp.array([[3]]), seen, 3, True)
    np.testing.assert_array_equal(allowed[0, 0], [False, False, True, True, True, False])
    np.testing.assert_array_equal(visible(jnp.array([[-1]]), seen, None, True), False)


@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_a_model_gives_the_same_numbers_whichever_way_it_attends(layer_loop):
    def hidden(attention):
        config = TransformerConfig(
            11, width=16, layers=3, heads=4, window=3, window_pattern=(True, False), layer_loop=layer_loop,
            attention=attention, local_rope_base=50.0,
        )  # fmt: skip
        model = transformer(config)
        tokens = jnp.asarray(POSITIONS % 11)
        return np.asarray(jax.jit(model.apply)(model.init(jax.random.key(0)), tokens, jnp.asarray(POSITIONS), None)[0])

    np.testing.assert_allclose(hidden("xla")[REAL], hidden("plain")[REAL], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hidden("auto"), hidden("plain"))


CASE = dict(queries=256, keys=256, head_size=128, dtype="bfloat16", cap=None)


@pytest.mark.parametrize(
    "backend, change, expected",
    [
        ("cpu", {}, "plain"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "plain"),
        ("gpu", {"cap": 50.0}, "plain"),
        ("gpu", {"head_size": 256}, "plain"),
        ("gpu", {"head_size": 12}, "plain"),
        ("gpu", {"queries": 1}, "plain"),
        ("tpu", {}, "splash"),
        ("tpu", {"cap": 50.0, "dtype": "float32"}, "splash"),
        ("tpu", {"queries": 1}, "plain"),
        ("tpu", {"queries": 64, "keys": 64}, "plain"),
    ],
)
def test_what_is_in_use_follows_from_backend_type_and_shape(backend, change, expected):
    assert attention_in_use("auto", backend=backend, **(CASE | change)) == expected


def test_what_is_asked_for_is_used_on_whole_sequences():
    assert attention_in_use("xla", **CASE) == "xla"
    assert attention_in_use("xla", **(CASE | {"queries": 1})) == "plain"


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(attention="flash"), "model.attention is 'flash'; it must be one of auto, plain, xla, cudnn, splash"),
        (dict(attention="xla", attention_cap=5.0), "model.attention is 'xla', which does not support a soft cap"),
        (dict(attention="cudnn"), "'cudnn', which computes in bfloat16 only"),
        (dict(attention_cap=0.0), "model.attention_cap is 0.0; it must be above 0"),
        (dict(window=0), "model.window is 0"),
        (dict(window=3, window_pattern=()), "model.window_pattern is empty"),
        (dict(window=3, window_pattern=(True,) * 5), "has 5 entries for 4 layers"),
        (dict(window_pattern=(True, False)), "model.window is not set"),
        (dict(local_rope_base=10.0), "model.window is not set"),
        (dict(rope_fraction=0.1), "model.rope_fraction is 0.1, which rotates 3 of 32 dimensions"),
        (dict(rope_fraction=1.5), "model.rope_fraction is 1.5"),
        (dict(activation="relu"), "model.activation is 'relu'"),
    ],
)
def test_switches_that_do_not_go_together_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(vocabulary_size=11, **bad)


@pytest.mark.parametrize("window, cap", [(None, None), (4, 1.5)])
def test_keys_in_several_parts_are_attended_as_if_they_stood_in_one(window, cap):
    # Rows 0 and 1 share the first six keys of row 0; the rest is their own.
    queries, keys, values = (jnp.asarray(x)[jnp.array([0, 0])] for x in inputs())
    queries, values = queries.at[1].multiply(0.5), values.at[1, :, 6:].multiply(2.0)
    positions = jnp.asarray(POSITIONS)[jnp.array([0, 0])]
    whole = attended(queries, keys, values, positions, scale=SCALE, window=window, cap=cap)
    keys = keys.swapaxes(-1, -2)
    shared = KeyValues(keys[:1, :, :, :6], values[:1, :, :6], positions[:1, :6])
    own = KeyValues(keys[..., 6:], values[:, :, 6:], positions[:, 6:])
    parts = attend(queries, own, positions, (shared,), scale=SCALE, window=window, cap=cap)
    real = np.asarray(positions) >= 0
    np.testing.assert_allclose(np.asarray(parts)[real], np.asarray(whole)[real], rtol=1e-5, atol=1e-6)
