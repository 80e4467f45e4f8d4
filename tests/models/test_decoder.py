"""The transformer against plain numpy, against itself with a cache, and against padding, order and the future."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import TransformerConfig, abstract, transformer
from jaxrl_llm.models.decoder import unstack
from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.layer_kinds import DeltaConfig, GlobalConfig

VOCABULARY, WIDTH = 19, 16
VARIANTS = {
    "one kv head, tied, qk_norm": dict(heads=4, kv_heads=1),
    "two kv heads, untied, no qk_norm": dict(heads=4, kv_heads=2, tie_embeddings=False, qk_norm=False),
    "four kv heads, sizes of its own": dict(heads=4, kv_heads=4, head_width=6, mlp_width=20, rope_base=100.0),
}
MIXED = dict(window=4, window_pattern=(True, False))
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9))
POSITIONS = np.tile(np.arange(9), (3, 1))


def model_of(variant: str, layer_loop: str = "unrolled", **more):
    sizes = dict(vocabulary_size=VOCABULARY, width=WIDTH, layers=2, norm_epsilon=1e-5, layer_loop=layer_loop)
    return transformer(TransformerConfig(**(sizes | VARIANTS[variant] | more)))


@functools.cache
def params_of(variant: str):
    """Random gains too, so that one that is left out shows. Numpy compiles nothing, unlike `init`."""
    rng = np.random.default_rng(1)
    shapes = abstract(model_of(variant).specs)

    def draw(path, leaf):
        gain = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + 0.4 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def applied(variant: str, layer_loop: str = "unrolled", **more):
    return jax.jit(model_of(variant, layer_loop, **more).apply)


def hidden_of(variant, tokens=TOKENS, positions=POSITIONS, layer_loop="unrolled"):
    tokens, positions = jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)
    return np.asarray(applied(variant, layer_loop)(params_of(variant), tokens, positions, None)[0])


def reference_logits(params, tokens, config: TransformerConfig) -> np.ndarray:
    """One unpadded sequence, in float64, with loops over layers, heads and queries."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length, size, group = len(tokens), config.head_size, config.heads // config.kv_heads

    def norm(x, gain):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon) * gain

    def rotated(x):
        half = size // 2
        angle = np.arange(length)[:, None] * config.rope_base ** (-np.arange(half) * 2.0 / size)
        turn = np.exp(1j * angle) * (x[:, :half] + 1j * x[:, half:])
        return np.concatenate([turn.real, turn.imag], axis=-1)

    x = p["embedding"][tokens]
    for layer in range(config.layers):
        block = jax.tree.map(lambda leaf: leaf[layer], p["blocks"])  # noqa: B023
        y = norm(x, block["attention_norm"])
        repeated = lambda i: np.repeat(block["qkv"][:, :, i], group, axis=1)  # noqa: B023, E731
        query_weights = block["qkv"][:, :, :group].reshape(WIDTH, config.heads, size)
        out_weights = block["attention_out"].reshape(config.heads, size, WIDTH)
        key_weights, value_weights = repeated(group), repeated(group + 1)
        for head in range(config.heads):
            q, k, v = (y @ w[:, head] for w in (query_weights, key_weights, value_weights))
            if config.qk_norm:
                q, k = norm(q, block["query_norm"]), norm(k, block["key_norm"])
            q, k = rotated(q), rotated(k)
            for t in range(length):
                scores = np.exp(q[t] @ k[: t + 1].T / np.sqrt(size))
                x[t] += (scores / scores.sum()) @ v[: t + 1] @ out_weights[head]
        gate, up = np.moveaxis(np.einsum("td,dcm->tcm", norm(x, block["mlp_norm"]), block["gate_up"]), 1, 0)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["down"]
    table = p["embedding"] if config.tie_embeddings else p["unembedding"]
    return norm(x, p["final_norm"]) @ table.T


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_a_plain_float64_forward(variant):
    model, params = model_of(variant), params_of(variant)
    ours = model.logits(params, hidden_of(variant))
    assert ours.dtype == jnp.float32
    for row in range(len(TOKENS)):
        np.testing.assert_allclose(ours[row], reference_logits(params, TOKENS[row], model.config), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scanned_blocks_equal_unrolled_blocks(variant):
    np.testing.assert_allclose(hidden_of(variant, layer_loop="scanned"), hidden_of(variant), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant, layer_loop", list(zip(VARIANTS, ("scanned", "unrolled", "scanned"), strict=True)))
def test_cached_decoding_equals_the_whole_forward_at_every_position(variant, layer_loop):
    model, params, apply = model_of(variant, layer_loop), params_of(variant), applied(variant, layer_loop)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    # Three rows of 9, 7 and 4 tokens, left-padded: the padding is inside the prefill of 6.
    positions = jnp.maximum(jnp.asarray(POSITIONS) - jnp.array([[0], [2], [5]]), -1).astype(jnp.int32)
    whole, none = apply(params, tokens, positions, None)
    assert none is None
    hidden, cache = apply(params, tokens[:, :6], positions[:, :6], model.init_cache(3, 11))
    pieces = [hidden]
    for t in range(6, 9):
        hidden, cache = apply(params, tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        pieces.append(hidden)
    real = np.asarray(positions) >= 0
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[real], whole[real], rtol=1e-5, atol=1e-5)
    assert int(cache.used) == 9
    np.testing.assert_array_equal(cache.positions, np.pad(positions, [(0, 0), (0, 2)], constant_values=-1))


@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_an_expanded_cache_shares_every_prompt_among_its_samples(layer_loop):
    model = model_of(next(iter(VARIANTS)), layer_loop)
    rng = np.random.default_rng(3)
    empty = model.init_cache(2, 6)
    layers = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), empty.layers)
    cache = empty._replace(layers=layers, positions=jnp.arange(12).reshape(2, 6), used=jnp.int32(6))
    expanded = model.expand_cache(cache, 3, 5)
    (shared,) = expanded.context
    jax.tree.map(np.testing.assert_array_equal, shared.layers, layers)
    np.testing.assert_array_equal(shared.positions, cache.positions)
    assert all(leaf.shape[-4] == 6 for leaf in jax.tree.leaves(expanded.layers))
    np.testing.assert_array_equal(expanded.positions, np.full((6, 5), -1))
    assert int(expanded.used) == 0


def test_left_padding_changes_nothing():
    variant = next(iter(VARIANTS))
    rng = np.random.default_rng(2)
    positions = np.pad(POSITIONS, [(0, 0), (5, 0)], constant_values=-1)
    padded = [
        hidden_of(variant, np.concatenate([rng.integers(0, VOCABULARY, (3, 5)), TOKENS], axis=1), positions)[:, 5:]
        for _ in range(2)
    ]
    np.testing.assert_array_equal(padded[0], padded[1])
    np.testing.assert_allclose(padded[0], hidden_of(variant), rtol=1e-5, atol=1e-5)


def test_padding_receives_no_gradient_and_spoils_none():
    variant = next(iter(VARIANTS))
    model = model_of(variant, layers=1)
    params = params_of(variant)
    params = params | {"blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    tokens = jnp.asarray(np.concatenate([np.full((3, 5), VOCABULARY - 1), TOKENS % (VOCABULARY - 1)], axis=1))
    positions = jnp.asarray(np.pad(POSITIONS, [(0, 0), (5, 0)], constant_values=-1))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sin(model.apply(params, tokens, positions, None)[0][:, 5:]).sum()

    gradients = gradient(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients["embedding"][-1], 0.0)
    assert (np.abs(gradients["embedding"][np.unique(tokens[:, 5:])]).sum(-1) > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_token_changes_no_earlier_state(variant):
    original = hidden_of(variant)
    for t in (0, 4, 8):
        changed = TOKENS.copy()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        hidden = hidden_of(variant, changed)
        np.testing.assert_array_equal(hidden[:, :t], original[:, :t])
        assert (np.abs(hidden[:, t:] - original[:, t:]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_rows_do_not_see_each_other(layer_loop):
    variant = list(VARIANTS)[1]
    order = np.array([2, 0, 1])
    permuted = hidden_of(variant, TOKENS[order], layer_loop=layer_loop)
    np.testing.assert_allclose(permuted, hidden_of(variant, layer_loop=layer_loop)[order], rtol=1e-6, atol=1e-6)


def test_positions_count_from_the_start_of_the_sequence_only():
    # Rotary scores depend on distances, so a common shift of all positions changes nothing: what differs is reading
    # the slot number for the position, or forgetting to rotate.
    variant = list(VARIANTS)[1]
    np.testing.assert_allclose(hidden_of(variant, positions=POSITIONS + 3), hidden_of(variant), rtol=1e-4, atol=1e-4)
    assert np.abs(hidden_of(variant, positions=2 * POSITIONS) - hidden_of(variant)).max() > 1e-2


def test_bfloat16_computes_in_bfloat16_and_scores_in_float32():
    variant = next(iter(VARIANTS))
    model = model_of(variant, compute_dtype="bfloat16")
    params = params_of(variant)
    hidden, cache = jax.jit(model.apply)(params, jnp.asarray(TOKENS), jnp.asarray(POSITIONS), model.init_cache(3, 9))
    scores = model.logits(params, hidden)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    assert scores.dtype == jnp.float32
    assert bool(jnp.isfinite(scores).all())
    exact = model.logits(params, hidden_of(variant))
    assert float(jnp.abs(scores - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def test_parameters_are_stored_in_the_dtype_asked_for():
    params = jax.eval_shape(model_of(list(VARIANTS)[1], parameter_dtype="bfloat16").init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_blocks_may_be_given_one_by_one():
    variant = list(VARIANTS)[1]
    model, params = model_of(variant), params_of(variant)
    blocks = unstack(params, model.config)
    assert isinstance(blocks["blocks"], tuple)
    assert unstack(blocks, model.config) is blocks
    hidden, _ = applied(variant)(blocks, jnp.asarray(TOKENS, jnp.int32), jnp.asarray(POSITIONS, jnp.int32), None)
    np.testing.assert_allclose(hidden, hidden_of(variant), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(vocabulary_size=0), "model.vocabulary_size is 0"),
        (dict(width=0), "model.width is 0"),
        (dict(layers=0), "model.layers is 0"),
        (dict(heads=0), "model.heads is 0"),
        (dict(kv_heads=-1), "model.kv_heads is -1"),
        (dict(heads=4, kv_heads=3), "kv_heads 3 does not divide"),
        (dict(width=18, heads=4), "set model.head_width"),
        (dict(width=12, heads=4), "model.head_width is 3; rotary positions need an even number"),
        (dict(head_width=5), "model.head_width is 5"),
        (dict(head_width=0), "model.head_width is 0"),
        (dict(head_width=-2), "model.head_width is -2"),
        (dict(mlp_width=0), "model.mlp_width is 0"),
        (dict(layer_loop="rolled"), "model.layer_loop is 'rolled'"),
        (dict(compute_dtype="float16"), "model.compute_dtype is 'float16'"),
        (dict(parameter_dtype="int8"), "model.parameter_dtype is 'int8'"),
        (dict(global_heads=GlobalConfig(8, 1)), "model.global_heads is set, but of 4 layers, .* model.window is None"),
        (MIXED | dict(global_heads=GlobalConfig(8, 3)), "model.heads is 2, which model.global_heads.kv_heads 3 does"),
        (MIXED | dict(global_heads=GlobalConfig(5, 1)), "a window, model.global_heads.head_width is 5; rotary"),
        (
            MIXED | dict(global_heads=GlobalConfig(8, 1), delta=DeltaConfig(1, 1, 2, 2)),
            "model.global_heads and model.d",
        ),
        (
            MIXED | dict(global_heads=GlobalConfig(8, 1), experts=ExpertsConfig(2, 1, dense_layers=1, dense_width=8)),
            "model.experts.dense_layers is 1, but with model.global_heads every layer has experts; set it to 0",
        ),
        (dict(reading_mlp_width=8), "model.reading_mlp_width is 8, .* but there are none; set both"),
    ],
)
def test_bad_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(dict(vocabulary_size=11, width=16, heads=2, kv_heads=1) | bad))


def test_windowed_layers_without_a_base_of_their_own_have_that_of_the_others():
    sizes = dict(vocabulary_size=11, width=16, layers=2, heads=2, kv_heads=1, layer_loop="unrolled")
    sizes |= MIXED | dict(global_heads=GlobalConfig(4, 1))
    tokens, positions = jnp.asarray(TOKENS % 11, jnp.int32), jnp.asarray(POSITIONS, jnp.int32)
    bases = ({}, {"local_rope_base": 10_000.0}, {"local_rope_base": 2.0})
    told = [transformer(TransformerConfig(**sizes | base)) for base in bases]
    rng, shapes = np.random.default_rng(1), abstract(told[0].specs)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)
    found = [np.asarray(jax.jit(model.apply)(params, tokens, positions, None)[0]) for model in told]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.1


def test_blocks_in_several_runs_are_cut_once_for_decoding():
    sizes = dict(width=8, layers=5, heads=2, kv_heads=1, head_width=4, window=3, window_pattern=(True, False))
    model = transformer(TransformerConfig(vocabulary_size=7, layer_loop="scanned", local_rope_base=10.0, **sizes))
    params = model.init(jax.random.key(0))
    cut = model.for_decoding(params)
    assert model.for_decoding(cut) is cut
    assert len(cut["runs"]) == 2
    assert "windowed_blocks" not in cut
    tokens, positions = jnp.array([[1, 2, 3, 4]]), jnp.arange(4)[None]
    programs = [str(jax.make_jaxpr(lambda p: model.apply(p, tokens, positions, None))(p)) for p in (params, cut)]
    assert programs[0].count(" slice[") - programs[1].count(" slice[") == 2 * len(jax.tree.leaves(cut["runs"][0]))
    ours, theirs = (jax.jit(model.apply)(p, tokens, positions, None)[0] for p in (params, cut))
    np.testing.assert_array_equal(ours, theirs)
