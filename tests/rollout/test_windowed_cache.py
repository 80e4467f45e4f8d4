"""Layers with a window keep it alone of what is sampled: less is held, and no number is another."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.models.cache import Windowed
from jaxrl_llm.models.layer_kinds import DeltaConfig, GlobalConfig
from jaxrl_llm.rollout import decoding
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rollout.prefixes import Prefixes

TOKENS, WINDOW, EOS = 24, 4, 1
SIZES = dict(vocabulary_size=17, width=16, layers=3, heads=4, kv_heads=2, head_width=8, window=WINDOW)
MIXED = SIZES | dict(window_pattern=(True, True, False), local_rope_base=100.0)
GLOBAL = GlobalConfig(head_width=16, kv_heads=1, values_are_keys=True)
WIDE_GLOBAL = SIZES | dict(layers=6, window_pattern=(True, True, False), local_rope_base=100.0, global_heads=GLOBAL)
MODELS = {
    "mixed": MIXED,
    "mixed, scanned": MIXED | dict(layers=7, layer_loop="scanned"),
    "all": SIZES | dict(attention_sinks=True),
    "all, scanned": SIZES | dict(layer_loop="scanned"),
    "wide global heads": WIDE_GLOBAL,
    "layers that read": WIDE_GLOBAL | dict(reading_layers=3, layer_loop="scanned"),
    "int8": MIXED | dict(cache_dtype="int8"),
    "paged where it could be": MIXED | dict(layer_loop="scanned", cache_layout="paged"),
}


@pytest.fixture(autouse=True)
def grows_early(monkeypatch):
    """The cache of so few tokens grows in three stages."""
    monkeypatch.setattr(decoding, "HALVED_FROM", (8, 16, 100))


def prompts() -> Prompts:
    """Left-padded, of different lengths: one is shorter than the window, one longer."""
    length = jnp.array([2, 7])
    tokens = jax.random.randint(jax.random.key(3), (2, 7), 2, 17)
    empty = jnp.zeros((2, 1), jnp.int32)
    return Prompts(
        tokens=jnp.where(jnp.arange(7) >= 7 - length[:, None], tokens, 0),
        length=length,
        prompt_id=jnp.arange(2),
        answer_tokens=empty,
        answer_length=jnp.zeros(2, jnp.int32),
    )


def shared_prefixes() -> Prefixes:
    """Two of each prompt, from which three samples each go on at places of their own."""
    tokens = jax.random.randint(jax.random.key(5), (4, 9), 2, 17)
    length = jnp.array([0, 9, 5, 8, 1, 3, 9, 9, 2, 0, 6, 7])
    return Prefixes(tokens, length, jnp.full((4, 9), Source.SAMPLED, jnp.int8))


def own_prefixes() -> Prefixes:
    shared = shared_prefixes()
    return Prefixes(jnp.repeat(shared.tokens, 3, 0), shared.length, jnp.repeat(shared.source, 3, 0))


WAYS = {
    "side by side": {},
    "greedy": dict(temperature=0.0),
    "slots": dict(slots=5),
    "groups of different sizes": dict(prompt_of=np.array([0] * 4 + [1] * 6)),
    "prefixes": dict(prefixes=own_prefixes),
    "shared prefixes": dict(prefixes=shared_prefixes),
}


def sampled(model, **ways):
    """(rows, the compiled program) of completions of which some end early."""
    params = model.init(jax.random.key(0))
    program = partial(
        generate, model, samples_per_prompt=6, max_completion_tokens=TOKENS, eos_ids=(EOS,), pad_id=0, **ways
    )
    compiled = jax.jit(program).lower(params, prompts(), jax.random.key(1), jnp.int32(0)).compile()
    return compiled(params, prompts(), jax.random.key(1), jnp.int32(0)), compiled


def same(ours, theirs):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.length, theirs.length)
    np.testing.assert_allclose(ours.behaviour_logprobs, theirs.behaviour_logprobs, rtol=1e-6, atol=1e-6)


def check(sizes, way):
    model = transformer(TransformerConfig(**sizes))
    ours, short = sampled(model, **way)
    theirs, whole = sampled(model._replace(keep_window=None), **way)
    same(ours, theirs)
    assert (np.asarray(ours.length) > 3 * WINDOW).any()
    assert len(np.unique(ours.length)) > 1 or way.get("temperature") == 0
    return short, whole


@pytest.mark.slow
def test_sampled_with_a_window_alone_is_sampled_with_all():
    """Through the growth of the cache, of prompts that are padded."""
    short, whole = check(MIXED | dict(layers=2, window_pattern=(True, False)), {})
    assert short.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_sample_with_every_kind_of_layers(model, way):
    if "paged" in model and way in ("slots", "groups of different sizes", "shared prefixes"):
        pytest.skip("pages are not offered for it")
    check(MODELS[model], {name: value() if callable(value) else value for name, value in WAYS[way].items()})


def test_what_is_kept_is_the_window_and_tokens_come_one_at_a_time():
    model = transformer(TransformerConfig(**MIXED))
    params, given = model.init(jax.random.key(0)), prompts()
    positions = jnp.where(jnp.arange(7) >= 7 - given.length[:, None], jnp.arange(7) - 7 + given.length[:, None], -1)
    prefill = lambda: model.apply(params, given.tokens, positions, model.init_cache(2, 7))[1]  # noqa: E731
    cache = jax.eval_shape(lambda: model.keep_window(model.expand_cache(prefill(), 3, 8), TOKENS))
    kinds = [(type(entry), entry.keys.shape[-1]) for entry in cache.layers]
    assert kinds[:2] == [(Windowed, WINDOW)] * 2
    assert kinds[2][1] == 8
    assert [part.keys.shape[-1] for part in cache.context[0].layers] == [7, 7, 7], "prompts stay whole"
    few = jax.eval_shape(lambda: model.keep_window(model.expand_cache(prefill(), 3, 8), WINDOW))
    assert few.recent is None, "nothing would be saved"
    with pytest.raises(ValueError, match="2 tokens a row were given with a cache that keeps a window"):
        jax.eval_shape(lambda: model.apply(params, jnp.zeros((6, 2), int), jnp.zeros((6, 2), int), cache))


@pytest.mark.parametrize("kind", ["mixed, scanned", "recurrent"])
def test_a_cache_that_grows_copies_no_window_and_no_state(kind):
    delta = DeltaConfig(key_heads=2, value_heads=2, key_width=8, value_width=8, pattern=(True, False))
    sizes = MODELS.get(kind) or {k: v for k, v in SIZES.items() if k != "window"} | {"delta": delta}
    model = transformer(TransformerConfig(**sizes))
    cache = jax.eval_shape(lambda: model.keep_window(model.expand_cache(model.init_cache(2, 7), 3, 8), TOKENS))
    grown = str(jax.make_jaxpr(lambda cache: model.expand_cache(cache, 1, 8))(cache))
    assert "gather" not in grown
    chosen = str(jax.make_jaxpr(lambda cache, rows: model.take_rows(cache, rows, 8))(cache, jnp.arange(6)))
    assert "gather" in chosen
