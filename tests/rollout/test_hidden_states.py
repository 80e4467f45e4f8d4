"""Samples of a prompt that go on from one pass over it are scored and differentiated as if each had its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Branches
from jaxrl_llm.models import ExpertsConfig, TransformerConfig, transformer
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.rollout.hidden_states import branched_hidden, predicting_hidden

VOCABULARY, SAMPLES, PROMPT, WIDTH = 17, 3, 5, 6
SIZES = dict(vocabulary_size=VOCABULARY, width=16, layers=2, heads=4, kv_heads=2, layer_loop="unrolled")


def rows(width):
    """Two prompts, one of them padded, with completions of many lengths, the empty one among them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, VOCABULARY, shape)  # noqa: E731
    prompt = np.repeat(draw(2, PROMPT), SAMPLES, axis=0)
    prompt_length = np.repeat([PROMPT, 2], SAMPLES)
    length = np.minimum([6, 1, 4, 0, 6, 3], width)
    return tuple(jnp.asarray(x, jnp.int32) for x in (prompt, prompt_length, draw(2 * SAMPLES, width), length))


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.slow), WIDTH])
@pytest.mark.parametrize(
    "more", [{}, pytest.param({"window": 3}, marks=pytest.mark.slow)], ids=["full attention", "windowed"]
)
def test_a_prompt_may_be_gone_through_once_for_its_samples(more, width):
    model = transformer(TransformerConfig(**SIZES, **more))
    params, given = model.init(jax.random.key(0)), rows(width)
    inside = jnp.arange(width) < given[3][:, None]

    def total(params, samples):
        hidden = predicting_hidden(model, params, *given, samples_per_prompt=samples)
        logprobs = token_statistics(model, params, hidden, given[2]).logprobs
        return jnp.sum(jnp.where(inside, jnp.sin(logprobs), 0.0)), logprobs

    differentiate = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    (shared, ours), (single, theirs) = differentiate(params, SAMPLES), differentiate(params, 1)
    np.testing.assert_allclose(ours[inside], theirs[inside], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), shared, single)
    assert np.isfinite(ours).all()


def operations(model, samples):
    params = jax.eval_shape(model.init, jax.random.key(0))
    scored = lambda params, *given: predicting_hidden(model, params, *given, samples_per_prompt=samples)  # noqa: E731
    return jax.jit(scored).lower(params, *rows(WIDTH)).cost_analysis()["flops"]


def test_it_is_less_work():
    model = transformer(TransformerConfig(**SIZES))
    # 2 prompts of 5 tokens and 6 completions of 5 that are looked at, instead of 6 rows of 11.
    assert operations(model, SAMPLES) < 0.8 * operations(model, 1)


@pytest.mark.parametrize("more", [{"layer_loop": "scanned"}, {"cache_dtype": "int8"}, {"attention": "xla"}], ids=str)
def test_models_that_are_better_off_otherwise_score_whole_rows(more):
    model = transformer(TransformerConfig(**(SIZES | more)))
    assert not model.shared_scoring
    assert operations(model, SAMPLES) == operations(model, 1)


@pytest.mark.slow
def test_recorded_experts_are_replayed_on_whole_rows():
    model = transformer(TransformerConfig(**SIZES, experts=ExpertsConfig(count=4, per_token=1)))
    params, given = model.init(jax.random.key(0)), rows(WIDTH)
    choices = jnp.zeros((2 * SAMPLES, PROMPT + WIDTH, 2, 1), jnp.int32)
    ours, theirs = (
        predicting_hidden(model, params, *given, router_choices=choices, samples_per_prompt=samples)
        for samples in (SAMPLES, 1)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_branches_of_a_row_are_scored_in_one_pass_over_it():
    model, count = transformer(TransformerConfig(**SIZES, window=4)), 3
    params, given = model.init(jax.random.key(0)), rows(WIDTH)
    length = np.asarray(given[3])
    rng = np.random.default_rng(1)
    kept = np.stack([np.zeros_like(length), length // 2, length], axis=1)
    ends = rng.integers(0, VOCABULARY, (6, count, 4))
    made = Branches(
        *(jnp.asarray(x, jnp.int32) for x in (kept, ends, rng.integers(1, 5, (6, count)))), jnp.ones(ends.shape)
    )
    seen = []

    def counted(params, tokens, positions, cache):
        seen.append(tokens.shape)
        return model.apply(params, tokens, positions, cache)

    shared = model._replace(apply=counted)
    ours, theirs = (
        jax.jit(lambda p, one=one: branched_hidden(one, p, *given, made))(params).reshape(6, count, 4, -1)
        for one in (shared, model._replace(cut_cache=None))
    )
    inside = np.arange(4) < np.asarray(made.length)[..., None]
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-5)
    assert seen == [(6, PROMPT + WIDTH), (6 * count, 3)]  # the rows once, and what follows
