"""Adapters: the base at first, then base + scale * down @ up in every way of computing it, and nothing else learns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import (
    ExpertsConfig,
    LoraConfig,
    LowRank,
    Quantised,
    TransformerConfig,
    abstract,
    add_adapters,
    dequantised,
    load_params,
    logical_axes,
    lora,
    merged,
    parameter_count,
    quantised,
    save_model,
    transformer,
    without_adapters,
)
from jaxrl_llm.models.adapters import OF_EXPERTS, TARGETS, adapter_specs, join, split
from jaxrl_llm.models.int4 import dequantised_groups, quantised_in_groups

VOCABULARY, ROWS, WIDTH = 19, 2, 7
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, WIDTH)), jnp.int32)
POSITIONS = jnp.tile(jnp.arange(WIDTH), (ROWS, 1))
LORA = LoraConfig(rank=3, alpha=5.0)
EXPERTS = ExpertsConfig(count=4, per_token=2)


@functools.cache
def base_model(layer_loop="unrolled", **more):
    sizes = dict(vocabulary_size=VOCABULARY, width=16, layers=2, heads=4, kv_heads=2, qkv_bias=True)
    return transformer(TransformerConfig(layer_loop=layer_loop, **(sizes | more)))


def random(shapes, seed, scale=0.3):
    """Numpy compiles nothing, unlike `init`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


@functools.cache
def base_params(**more):
    return random(abstract(base_model(**more).specs), seed=1)


@functools.cache
def adapted(bits=0, learned=True, config=LORA, **more):
    """What `add_adapters` gives, with an `up` that is random where something was learned."""
    blocks = dict(base_params(**more)["blocks"])
    for seed, (name, shapes) in enumerate(adapter_specs(blocks, config).items()):
        stacked = 2 if name in OF_EXPERTS and "router" in blocks else 1
        base = blocks[name]
        if bits:
            base = {8: quantised, 4: quantised_in_groups}[bits](base, inputs=TARGETS[name], stacked=stacked)
        pair = random(abstract(shapes), seed)
        up = pair["up"] if learned else jnp.zeros(pair["up"].shape)
        blocks[name] = LowRank(base, pair["down"], up, config.scale)
    return base_params(**more) | {"blocks": blocks}


def hidden_of(params, layer_loop="unrolled", **more):
    return np.asarray(jax.jit(base_model(layer_loop, **more).apply)(params, TOKENS, POSITIONS, None)[0])


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_before_it_learns_it_is_exactly_the_base(layer_loop):
    np.testing.assert_array_equal(hidden_of(adapted(learned=False), layer_loop), hidden_of(base_params(), layer_loop))


@pytest.mark.parametrize("bits", [0, pytest.param(8, marks=pytest.mark.slow), 4])
def test_merged_parameters_compute_the_same(bits):
    params = adapted(bits)
    assert np.abs(hidden_of(params) - hidden_of(without_adapters(params))).max() > 0.05
    np.testing.assert_allclose(hidden_of(merged(params)), hidden_of(params), rtol=1e-5, atol=1e-5)


def test_merged_is_the_formula():
    node = adapted()["blocks"]["attention_out"]
    base, down, up = (np.asarray(leaf, np.float64) for leaf in (node.base, node.down, node.up))
    expected = base + 5.0 / 3 * np.einsum("lkghr,lrd->lkghd", down, up)
    np.testing.assert_allclose(merged(adapted())["blocks"]["attention_out"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [0, 8, pytest.param(4, marks=pytest.mark.slow)])
def test_scanned_is_unrolled_and_cached_is_uncached(bits):
    params, expected = adapted(bits), hidden_of(adapted(bits))
    np.testing.assert_allclose(hidden_of(params, "scanned"), expected, rtol=1e-5, atol=1e-5)
    for layer_loop in ("unrolled", "scanned"):
        model = base_model(layer_loop)
        apply, cache, parts = jax.jit(model.apply), model.init_cache(ROWS, WIDTH), []
        for first, last in ((0, 4), (4, 5), (5, 6), (6, 7)):
            hidden, cache = apply(params, TOKENS[:, first:last], POSITIONS[:, first:last], cache)
            parts.append(hidden)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_is_that_of_the_merged_matrix_through_the_chain_rule():
    params, model = adapted(), base_model()
    trained, frozen = split(params)

    def loss(params):
        return jnp.sum(model.logits(params, model.apply(params, TOKENS, POSITIONS, None)[0])[..., 3] ** 2)

    found = jax.jit(jax.grad(lambda part: loss(join(part, frozen))))(trained)["blocks"]
    full = jax.jit(jax.grad(loss))(merged(params))["blocks"]
    for name, inputs in ((name, TARGETS[name]) for name in LORA.targets):
        node = params["blocks"][name]
        down, up = node.down.reshape(2, -1, 3), node.up.reshape(2, 3, -1)
        whole = full[name].reshape(2, down.shape[1], up.shape[2])
        for ours, expected in (
            (found[name]["down"], LORA.scale * whole @ up.swapaxes(1, 2)),
            (found[name]["up"], LORA.scale * down.swapaxes(1, 2) @ whole),
        ):
            np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=2e-4, atol=2e-4)
        assert inputs == full[name].ndim - 1 - (node.up.ndim - 2)


def test_an_adapter_computes_in_the_dtype_of_its_input():
    params = adapted(parameter_dtype="bfloat16")
    node = params["blocks"]["qkv"]
    assert (node.base.dtype, node.down.dtype, node.up.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    model = base_model(compute_dtype="bfloat16", parameter_dtype="bfloat16")
    assert jax.eval_shape(lambda: model.apply(params, TOKENS, POSITIONS, None)[0]).dtype == jnp.bfloat16
    assert merged(params)["blocks"]["qkv"].dtype == jnp.bfloat16


def test_rank_stabilised_scale():
    assert LoraConfig(rank=16, alpha=8).scale == 0.5
    assert LoraConfig(rank=16, alpha=8, rank_stabilised=True).scale == 2.0
    for stabilised, scale in ((False, 0.5), (True, 1.0)):
        model = lora(base_model(), LoraConfig(4, 2.0, rank_stabilised=stabilised))
        assert jax.eval_shape(model.init, jax.random.key(0))["blocks"]["qkv"].scale == scale


def test_attention_of_a_mixture_of_experts_takes_adapters():
    config = LoraConfig(rank=2, alpha=2.0, targets=("qkv", "attention_out"))
    params = adapted(config=config, experts=EXPERTS)
    assert split(params)[0]["blocks"].keys() == {"qkv", "attention_out"}
    expected = hidden_of(merged(params), experts=EXPERTS)
    np.testing.assert_allclose(hidden_of(params, experts=EXPERTS), expected, rtol=1e-5, atol=1e-5)


# ---- the tree --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_the_specs_of_a_model_are_its_parameters(bits):
    model = lora(base_model(), LORA, bits=bits)
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(made) == jax.tree.structure(abstract(model.specs))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made, abstract(model.specs))
    assert all(jax.tree.leaves(same))
    assert parameter_count(model.specs) == sum(leaf.size for leaf in jax.tree.leaves(made))
    axes = logical_axes(model.specs)["blocks"]["attention_out"]
    assert (axes.down, axes.up) == (("layer", "kv_heads", None, None, None), ("layer", None, "embed"))


def test_a_split_takes_the_adapters_and_leaves_every_array_where_it_was():
    params = adapted()
    trained, frozen = split(params)
    shapes = {name: leaf.shape for name, leaf in named(trained).items()}
    assert shapes == {
        "['blocks']['qkv']['down']": (2, 16, 3),
        "['blocks']['qkv']['up']": (2, 3, 2, 4, 4),
        "['blocks']['attention_out']['down']": (2, 2, 2, 4, 3),
        "['blocks']['attention_out']['up']": (2, 3, 16),
        "['blocks']['gate_up']['down']": (2, 16, 3),
        "['blocks']['gate_up']['up']": (2, 3, 2, 48),
        "['blocks']['down']['down']": (2, 48, 3),
        "['blocks']['down']['up']": (2, 3, 16),
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == parameter_count(base_model().specs)
    again = join(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))


def test_the_reference_is_the_base_itself_and_no_copy():
    params = adapted()
    found, expected = named(without_adapters(params)), named(base_params())
    assert found.keys() == expected.keys()
    assert all(found[name] is leaf for name, leaf in expected.items())
    quantised_base = without_adapters(adapted(8))
    assert quantised_base["blocks"]["qkv"] is adapted(8)["blocks"]["qkv"].base


def test_parameters_without_adapters_split_into_nothing_and_all():
    trained, frozen = split(base_params())
    assert trained == {}
    assert jax.tree.structure(join(trained, frozen)) == jax.tree.structure(base_params())
    assert merged(base_params())["blocks"]["qkv"] is base_params()["blocks"]["qkv"]


def test_adapters_are_drawn_by_path_and_the_base_is_left_alone():
    draw = jax.jit(add_adapters, static_argnames=("config", "bits"))
    every = draw(base_params(), LORA, jax.random.key(1), bits=8)
    some = draw(base_params(), LoraConfig(3, 1.0, targets=("down",)), jax.random.key(1))
    assert jax.tree.structure(every) == jax.tree.structure(adapted(8))
    found, expected = named(without_adapters(every)), named(without_adapters(adapted(8)))
    for name, leaf in expected.items():
        # Another order of operations may round a weight in the middle of two values up or down.
        np.testing.assert_allclose(found[name], leaf, rtol=1e-6, atol=leaf.dtype == jnp.int8)
    every, some = every["blocks"], some["blocks"]
    np.testing.assert_array_equal(some["down"].base, base_params()["blocks"]["down"])
    np.testing.assert_array_equal(some["down"].down, every["down"].down)
    assert not isinstance(some["qkv"], LowRank)
    assert not np.allclose(every["qkv"].down, every["gate_up"].down)
    assert np.std(every["down"].down) == pytest.approx(48**-0.5, rel=0.15)
    assert not any(np.any(every[name].up) for name in LORA.targets)


def test_what_was_merged_is_exported_and_read_again(tmp_path):
    # No family has biases on all three projections, a norm on queries and no bias on the output.
    model = base_model(qkv_bias=False)
    params = adapted(8, qkv_bias=False)
    save_model(tmp_path / "merged", merged(params), model.config)
    read = load_params(tmp_path / "merged", model.config)
    jax.tree.map(np.testing.assert_array_equal, read, merged(params))
    with pytest.raises(ValueError, match=r"blocks/attention_out.* have adapters or few bits; give merged"):
        save_model(tmp_path / "adapted", params, model.config)


# ---- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [1, 3])
def test_an_int8_weight_is_off_by_less_than_one_percent(inputs):
    weights = jnp.asarray(np.random.default_rng(3).standard_normal((2, 8, 4, 16, 8)), jnp.float32)
    stored = quantised(weights, inputs=inputs)
    assert stored.values.dtype == jnp.int8
    assert stored.values.shape == weights.shape
    assert stored.scale.shape == ((2, 1, 4, 16, 8) if inputs == 1 else (2, 1, 1, 1, 8))
    error = np.asarray(dequantised(stored) - weights)
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(weights)
    assert np.all(np.abs(error) <= np.asarray(stored.scale) * 0.5001)
    # Symmetric, and what is stored already stays as it is.
    np.testing.assert_array_equal(quantised(-weights, inputs=inputs).values, -stored.values)
    np.testing.assert_array_equal(quantised(dequantised(stored), inputs=inputs).values, stored.values)


@pytest.mark.parametrize("inputs", [1, 3])
def test_an_int4_weight_is_off_by_half_a_step_of_its_group(inputs):
    weights = jnp.asarray(np.random.default_rng(3).standard_normal((2, 128, 3, 192, 8)), jnp.float32)
    stored = quantised_in_groups(weights, inputs=inputs)
    wide = dequantised_groups(stored)
    assert (stored.values.dtype, wide.shape, wide.dtype) == (jnp.uint8, weights.shape, weights.dtype)
    assert stored.scale.shape == ((2, 2, 3, 192, 8) if inputs == 1 else (2, 128, 3, 3, 8))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) * 8 == 4.25 * weights.size
    error = np.asarray(wide - weights)
    assert 0.09 < np.linalg.norm(error) / np.linalg.norm(weights) < 0.11
    steps = np.repeat(np.asarray(stored.scale, np.float32), 64, axis=1 if inputs == 1 else 3)
    assert np.all(np.abs(error) <= steps * 0.52)  # the scale is rounded to bfloat16
    # The same layer by layer, as a scan reads it; symmetric; what is stored already stays as it is.
    one = jax.tree.map(lambda leaf: leaf[1], stored)
    np.testing.assert_array_equal(dequantised_groups(one), wide[1])
    np.testing.assert_array_equal(dequantised_groups(quantised_in_groups(-weights, inputs=inputs)), -wide)
    np.testing.assert_allclose(dequantised_groups(quantised_in_groups(wide, inputs=inputs)), wide, rtol=0.01)


def test_an_odd_number_of_inputs_does_not_fill_bytes():
    with pytest.raises(ValueError, match="a matrix has 9 inputs, an odd number"):
        quantised_in_groups(jnp.ones((1, 9, 4)), inputs=1)


def test_an_output_whose_weights_are_all_zero_stays_zero():
    stored = quantised(jnp.zeros((1, 4, 2), jnp.bfloat16), inputs=1)
    assert dequantised(stored).dtype == jnp.bfloat16
    assert np.all(np.asarray(dequantised(stored), np.float32) == 0)


def test_an_int8_base_is_close_and_a_quarter_of_the_size():
    params = adapted(8, learned=False)
    node = params["blocks"]["qkv"]
    assert isinstance(node.base, Quantised)
    assert node.base.values.nbytes * 4 == base_params()["blocks"]["qkv"].nbytes
    exact, close = hidden_of(base_params()), hidden_of(params)
    assert 0 < np.linalg.norm(close - exact) < 0.03 * np.linalg.norm(exact)
    # What int8 does not cover is left alone.
    assert params["embedding"] is base_params()["embedding"]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(rank=0, alpha=1.0), "lora.rank is 0; it must be at least 1"),
        (dict(rank=2, alpha=0.0), "lora.alpha is 0.0; .* above 0"),
        (dict(rank=2, alpha=float("nan")), "lora.alpha is nan"),
        (dict(rank=2, alpha=float("inf")), "lora.alpha is inf"),
        (dict(rank=2, alpha=1.0, targets=()), "lora.targets is empty"),
        (dict(rank=2, alpha=1.0, targets=("qvk",)), "names 'qvk', which is no matrix of a block; did you mean qkv?"),
        (dict(rank=2, alpha=1.0, targets=("embedding",)), "names 'embedding', .* known: qkv, attention_out"),
        (dict(rank=2, alpha=1.0, targets=("qkv", "qkv")), "names one matrix twice"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**config)


@pytest.mark.parametrize("bits", [pytest.param(0, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow), 4])
def test_every_expert_has_an_adapter_of_its_own(bits):
    with_experts = {"experts": EXPERTS}
    params = adapted(bits, **with_experts)
    assert params["blocks"]["gate_up"].down.shape == (2, 4, 16, 3)
    np.testing.assert_allclose(
        hidden_of(merged(params), **with_experts), hidden_of(params, **with_experts), rtol=1e-5, atol=1e-5
    )
    base, start = base_params(**with_experts), adapted(learned=False, **with_experts)
    np.testing.assert_array_equal(hidden_of(start, **with_experts), hidden_of(base, **with_experts))
    # Each one alone, by its formula.
    node, whole = params["blocks"]["down"], merged(params)["blocks"]["down"]
    stored = {8: dequantised, 4: dequantised_groups}.get(bits, lambda base: base)(node.base)
    change = np.einsum("leir,lero->leio", np.asarray(node.down, np.float64), np.asarray(node.up, np.float64))
    np.testing.assert_allclose(whole, stored + 5.0 / 3 * change, rtol=1e-5, atol=1e-5)
    adapted_model = lora(base_model(**with_experts), LORA, bits=bits)
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
    assert shapes(abstract(adapted_model.specs)) == shapes(params)


def test_adapters_are_not_stacked_on_adapters():
    with pytest.raises(ValueError, match="names 'qkv', which has an adapter already"):
        add_adapters(adapted(), LORA, jax.random.key(0))


def test_a_model_without_blocks_is_refused(make_bigram):
    with pytest.raises(ValueError, match="lora is set, but the parameters of this model have no stacked blocks"):
        lora(make_bigram(5), LORA)
