"""Pages hold what the contiguous cache holds, and the kernel computes what gathering them does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental import pallas
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.models.attention import KeyValues, attend
from jaxrl_llm.models.cache import Cache, KeysAndValues
from jaxrl_llm.models.paged import PAGE, PagedBlock, expanded, gathered, kernel_attention, longer, paged, written
from jaxrl_llm.rollout import Prefixes, generate

LAYERS, KV_HEADS, GROUP, SIZE, WIDTH, SAMPLES = 2, 2, 2, 128, 2 * PAGE + 3, 2
LENGTHS = np.array([WIDTH, PAGE, 5])


def prefilled(size=SIZE):
    """A contiguous cache whose keys say where they belong: layer, prompt, token."""
    rng = np.random.default_rng(0)
    shape = (LAYERS, len(LENGTHS), KV_HEADS, size, WIDTH)
    keys = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    values = jnp.asarray(rng.standard_normal(shape).swapaxes(-1, -2), jnp.float32)
    positions = np.maximum(np.arange(WIDTH) - (WIDTH - LENGTHS[:, None]), -1)
    return Cache(KeysAndValues(keys, values), jnp.asarray(positions, jnp.int32), jnp.int32(WIDTH))


def block_of(cache, layer, pages=None):
    return PagedBlock(cache.pages if pages is None else pages, cache.table, layer * cache.pages_per_layer(LAYERS))


def test_samples_share_the_full_pages_of_their_prompt():
    cache = paged(prefilled(), SAMPLES, 20)
    table = np.asarray(cache.table)
    for n, length in enumerate(LENGTHS):
        one, other = table[SAMPLES * n], table[SAMPLES * n + 1]
        full = length // PAGE
        np.testing.assert_array_equal(one[:full], other[:full])
        assert not set(one[full : full + 2]) & set(other[full : full + 2])
    # Pages of prompts exist once each, beside each row's own.
    own = -(-(20 + PAGE) // PAGE)
    assert cache.pages_per_layer(LAYERS) == len(LENGTHS) * 3 + len(LENGTHS) * SAMPLES * own


@pytest.mark.parametrize("grown", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pages_hold_the_tokens_in_order_and_what_is_written_behind_them(grown):
    given = prefilled()
    cache = paged(given, SAMPLES, 4 if grown else 20)
    if grown:
        cache = longer(cache, 24, LAYERS)
    rows = len(LENGTHS) * SAMPLES
    rng = np.random.default_rng(1)
    said = rng.standard_normal((LAYERS, 20, rows, KV_HEADS, SIZE)).astype(np.float32)
    lengths = np.repeat(LENGTHS, SAMPLES)
    pages = cache.pages
    for layer in range(LAYERS):
        for t in range(20):
            positions = jnp.asarray(np.where(np.arange(rows) == 1, -1, lengths + t), jnp.int32)[:, None]
            new = KeysAndValues(said[layer, t][..., None], -said[layer, t][:, :, None])
            pages = written(block_of(cache, layer, pages), positions, new)
    for layer in range(LAYERS):
        found, positions = gathered(block_of(cache, layer, pages))
        for row in range(rows):
            prompt, length = row // SAMPLES, lengths[row]
            keys = given.layers.keys[layer, prompt, :, :, WIDTH - length :]
            np.testing.assert_array_equal(found.keys[row, :, :, :length], keys)
            values = given.layers.values[layer, prompt, :, WIDTH - length :]
            np.testing.assert_array_equal(found.values[row, :, :length], values)
            if row != 1:
                here = found.values[row, :, length : length + 20]
                np.testing.assert_array_equal(here, -said[layer][:, row].swapaxes(0, 1))
        assert positions[0].tolist() == list(range(positions.shape[1]))


@pytest.mark.parametrize("window, cap", [(None, None), (7, None), (None, 5.0)])
def test_the_kernel_computes_what_gathering_does(window, cap, monkeypatch):
    # In Pallas' interpreter, which the kernel has no option for and which takes constants for arrays without a shape.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    monkeypatch.setattr(kernel.pl, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    cache = paged(prefilled(), SAMPLES, 8)
    rows = len(LENGTHS) * SAMPLES
    rng = np.random.default_rng(2)
    queries = jnp.asarray(rng.standard_normal((rows, 1, KV_HEADS, GROUP, SIZE)), jnp.float32)
    positions = jnp.asarray(np.repeat(LENGTHS, SAMPLES) - 1, jnp.int32)[:, None]
    block = block_of(cache, 1)
    ours = kernel_attention(queries, block, positions, scale=0.1, window=window, cap=cap)
    found, seen = gathered(block)
    plain = attend(queries, KeyValues(*found, seen), positions, scale=0.1, window=window, cap=cap)
    np.testing.assert_allclose(ours, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_a_model_says_the_same_from_pages(layer_loop):
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "layer_loop": layer_loop}
    prompts = Prompts(
        tokens=jnp.array([[0, 0, 3, 2, 4], [5, 2, 3, 4, 2]]),
        length=jnp.array([3, 5]),
        prompt_id=jnp.array([11, 4]),
        answer_tokens=jnp.zeros((2, 1), jnp.int32),
        answer_length=jnp.ones(2, jnp.int32),
    )
    given = Prefixes(jnp.full((6, 3), 4), jnp.array([0, 1, 3, 2, 0, 3]), jnp.full((6, 3), Source.HINT))
    made = []
    for layout in ("contiguous", "paged"):
        model = transformer(TransformerConfig(7, cache_layout=layout, window=6, window_pattern=(True, False), **sizes))
        params = jax.tree.map(lambda x: 2 * x, model.init(jax.random.key(0)))
        for prefixes in (None, given):
            run = jax.jit(
                lambda params, model=model, prefixes=prefixes: generate(
                    model,
                    params,
                    prompts,
                    jax.random.key(1),
                    0,
                    samples_per_prompt=3,
                    max_completion_tokens=PAGE + 9,
                    eos_ids=(1,),
                    pad_id=0,
                    prefixes=prefixes,
                )
            )
            made.append(jax.device_get(run(params)))
    for one, other in zip(made[:2], made[2:], strict=True):
        assert len(set(one.length.tolist())) > 1
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.behaviour_logprobs, other.behaviour_logprobs, atol=1e-5)


def test_bad_layouts():
    with pytest.raises(ValueError, match="pages have the compute dtype"):
        TransformerConfig(7, cache_layout="paged", cache_dtype="int8")
    with pytest.raises(ValueError, match="3 samples of a row whose cache is in pages"):
        expanded(paged(prefilled(), 1, 4), 3, 4, config=TransformerConfig(7))
