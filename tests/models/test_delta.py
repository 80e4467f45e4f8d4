"""Gated delta-net layers: in chunks as token by token, padding anywhere, and a state that slots and prefixes carry."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models import DeltaConfig, TransformerConfig, abstract, transformer
from jaxrl_llm.models.delta import chunked_delta, delta_mixed, recurrent_delta
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.rollout import Prefixes, generate, predicting_hidden

DELTA = DeltaConfig(key_heads=2, value_heads=4, key_width=3, value_width=5, kernel=3, pattern=(True, False))
CONFIG = TransformerConfig(vocabulary_size=7, width=16, layers=2, heads=2, kv_heads=1, delta=DELTA, attention_gate=True)
EOS, STEPS, SAMPLES = 1, 10, 3
PROMPTS = Prompts(
    tokens=jnp.array([[0, 0, 3, 2, 4], [5, 2, 3, 4, 2]]),
    length=jnp.array([3, 5]),
    prompt_id=jnp.array([11, 4]),
    answer_tokens=jnp.zeros((2, 1), jnp.int32),
    answer_length=jnp.ones(2, jnp.int32),
)


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)


@functools.cache
def model_of(layer_loop="unrolled"):
    # Two periods where there is a loop over them.
    return transformer(replace(CONFIG, layer_loop=layer_loop, layers=2 if layer_loop == "unrolled" else 4))


@functools.cache
def params(layer_loop="unrolled"):
    return drawn(abstract(model_of(layer_loop).specs)) | {"final_norm": jnp.ones(CONFIG.width)}


@pytest.mark.parametrize("length, chunk", [(13, 4), (9, 64)])
def test_chunks_say_what_tokens_say_one_by_one(length, chunk):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)  # noqa: E731
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    # Keys that are nearly the same, as in a text that repeats itself, and tokens that count for nothing.
    keys = unit(normal(1, 2, 6) + 0.3 * normal(length, 2, 6))
    decay, strength = -jax.nn.softplus(normal(length, 2, 3)), jax.nn.sigmoid(3 + normal(length, 2, 3))
    off = jnp.arange(length)[:, None, None] % 5 == 3
    decay, strength = jnp.where(off, 0.0, decay), jnp.where(off, 0.0, strength)
    arguments = unit(normal(length, 2, 6)), keys, normal(length, 2, 3, 4), decay, strength, normal(2, 3, 6, 4)

    def total(function, arguments):
        out, state = function(*arguments)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state)), (out, state)

    gradient = lambda function: jax.jit(jax.grad(functools.partial(total, function), has_aux=True))(arguments)  # noqa: E731
    ours, expected = gradient(functools.partial(chunked_delta, chunk=chunk)), gradient(recurrent_delta)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(one - other).max() < 1e-5 * max(1.0, np.abs(other).max())


@pytest.mark.parametrize("chunk", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_a_packed_sequence_starts_with_nothing_remembered(chunk):
    rng, lengths = np.random.default_rng(5), (5, 1, 7)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((1, 13, *shape)), jnp.float32)  # noqa: E731
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    tokens = unit(normal(2, 6)), unit(normal(2, 6)), normal(2, 3, 4)
    tokens = *tokens, -jax.nn.softplus(normal(2, 3)), jax.nn.sigmoid(normal(2, 3))
    segments = jnp.asarray(np.repeat([4, 9, 2], lengths))[None]
    ours, state = chunked_delta(*tokens, jnp.zeros((1, 2, 3, 6, 4)), chunk=chunk, segments=segments)
    start = 0
    for length in lengths:
        alone = (x[:, start : start + length] for x in tokens)
        theirs, last = recurrent_delta(*alone, jnp.zeros((1, 2, 3, 6, 4)))
        np.testing.assert_allclose(ours[:, start : start + length], theirs, atol=1e-5)
        start += length
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_padding_changes_neither_outputs_nor_state_wherever_it_stands():
    block = jax.tree.map(lambda leaf: leaf[0], params()["delta_blocks"])
    run = jax.jit(lambda x, positions: delta_mixed(block, x, positions, None, DELTA, epsilon=1e-6))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 5, CONFIG.width)), jnp.float32)
    out, state = run(x, jnp.arange(5)[None])
    places = np.array([1, 2, 4, 5, 8])
    spread = jnp.full((1, 10, CONFIG.width), 9.0).at[:, places].set(x)
    positions = jnp.full((1, 10), -1).at[:, places].set(jnp.arange(5))
    padded, same = run(spread, positions)
    np.testing.assert_allclose(padded[:, places], out, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, state)


def sampled(layer_loop="unrolled", **options):
    model = model_of(layer_loop)
    sizes = {"max_completion_tokens": STEPS, "eos_ids": (EOS,), "pad_id": 0, "samples_per_prompt": SAMPLES}
    run = jax.jit(lambda p: generate(model, p, PROMPTS, jax.random.key(42), 3, **(sizes | options)))
    return jax.device_get(run(params(layer_loop)))


@functools.cache
def whole(layer_loop="unrolled"):
    return sampled(layer_loop)


BOTH_LOOPS = pytest.mark.parametrize("layer_loop", ["unrolled", pytest.param("scanned", marks=pytest.mark.slow)])


@BOTH_LOOPS
@pytest.mark.parametrize("prefixed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_slots_and_prefixes_change_nothing(layer_loop, prefixed):
    expected, options = whole(layer_loop), {}
    if prefixed:
        cut = np.minimum([0, 1, 3, 99, 2, 4], np.minimum(expected.length, STEPS - 1))
        inside = np.arange(cut.max()) < cut[:, None]
        options["prefixes"] = Prefixes(expected.tokens[:, : cut.max()], cut, np.where(inside, Source.SAMPLED, 0))
    ours = sampled(layer_loop, slots=2, **options)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_allclose(ours.behaviour_logprobs, expected.behaviour_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@BOTH_LOOPS
def test_what_was_sampled_is_what_is_trained_with_one_pass_over_a_prompt_or_one_a_sample(layer_loop):
    model, rows = model_of(layer_loop), whole(layer_loop)
    given = rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length
    assert len(set(rows.length.tolist())) > 2

    def scored(params, samples):
        hidden = predicting_hidden(model, params, *given, samples_per_prompt=samples)
        logprobs = token_statistics(model, params, hidden, rows.tokens).logprobs * rows.mask
        return jnp.sum(jnp.sin(logprobs)), logprobs

    run = jax.jit(jax.grad(scored, has_aux=True), static_argnums=1)
    gradients, logprobs = run(params(layer_loop), SAMPLES)
    np.testing.assert_allclose(logprobs, rows.behaviour_logprobs * rows.mask, rtol=1e-5, atol=1e-5)
    if layer_loop == "unrolled":
        single = run(params(), 1)[0]
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(single), strict=True):
            assert np.abs(one - other).max() < 1e-4 * max(1.0, np.abs(other).max())
