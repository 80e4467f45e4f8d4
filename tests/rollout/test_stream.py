"""Completions handed out in pieces are those of `generate`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.models.functions import from_functions
from jaxrl_llm.rollout import Controls, generate, make_stream
from jaxrl_llm.run.compilation import CompilationWatch

# Programs of many sizes: minutes of compilation.
pytestmark = pytest.mark.slow

VOCABULARY, EOS, PAD, STEPS, SAMPLES = 7, 1, 0, 12, 3
KEY = jax.random.key(42)
SIZES = {"samples_per_prompt": SAMPLES, "max_completion_tokens": STEPS, "eos_ids": (EOS,), "pad_id": PAD}
PROMPTS = Prompts(
    tokens=jnp.array([[0, 0, 3, 2, 4], [5, 2, 3, 4, 2]]),
    length=jnp.array([3, 5]),
    prompt_id=jnp.array([11, 4]),
    answer_tokens=jnp.zeros((2, 1), jnp.int32),
    answer_length=jnp.ones(2, jnp.int32),
)


def transformer_of(layer_loop):
    model = transformer(TransformerConfig(VOCABULARY, 16, 2, 2, kv_heads=1, layer_loop=layer_loop))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.float32(0.5 * rng.standard_normal(x.shape)), model.init(jax.random.key(0)))
    return model, params | {"final_norm": jnp.ones(16)}


def without_cache():
    return from_functions(
        init=lambda key: {"table": 0.3 * jax.random.normal(key, (VOCABULARY, 8))},
        apply=lambda params, tokens, positions: params["table"][tokens] * (positions[..., None] >= 0),
        logits=lambda params, hidden: hidden @ params["table"].T,
        vocabulary_size=VOCABULARY,
    )


@pytest.fixture(scope="module", params=["unrolled", "scanned", "without a cache"])
def policy(request):
    if request.param != "without a cache":
        return transformer_of(request.param)
    model = without_cache()
    return model, model.init(jax.random.key(0))


def whole(policy, **options):
    model, params = policy
    made = jax.jit(lambda params: generate(model, params, PROMPTS, KEY, 3, **SIZES, **options))(params)
    return jax.device_get(made)


def assert_same(drawn, made):
    np.testing.assert_array_equal(drawn.length, made.length)
    np.testing.assert_array_equal(drawn.tokens, made.tokens)
    np.testing.assert_array_equal(drawn.truncated, made.truncated)
    np.testing.assert_allclose(drawn.logprobs, made.behaviour_logprobs, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 5, STEPS, 99])
def test_pieces_add_up_to_one_rollout(policy, piece):
    model, params = policy
    made = whole(policy)
    assert set(made.truncated.tolist()) == {True, False}
    pieces = list(make_stream(model, **SIZES)(params, PROMPTS, KEY, 3, piece))
    assert len(pieces) == -(-max(made.length) // min(piece, STEPS))
    for number, drawn in enumerate(pieces, start=1):
        np.testing.assert_array_equal(drawn.length, np.minimum(made.length, number * piece))
        inside = np.arange(STEPS) < drawn.length[:, None]
        np.testing.assert_array_equal(drawn.tokens[inside], made.tokens[inside])
    assert drawn.over.all()
    assert_same(drawn, made)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"controls": Controls(top_k=4, repetition_penalty=1.5, min_completion_tokens=4)}],
)
def test_greedy_and_controlled_pieces_too(options):
    policy = transformer_of("unrolled")
    *_, last = make_stream(policy[0], **SIZES, **options)(policy[1], PROMPTS, KEY, 3, 2)
    assert_same(last, whole(policy, **options))


def test_pieces_of_any_size_share_one_program():
    model, params = transformer_of("scanned")
    stream = make_stream(model, **SIZES)
    list(stream(params, PROMPTS, KEY, 3, 4))
    with CompilationWatch() as watch:
        list(stream(params, PROMPTS, KEY, 7, 1))
    assert watch.count + watch.read == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0; it must be at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"controls": Controls(min_completion_tokens=99)}, "min_completion_tokens is 99"),
    ],
)
def test_what_cannot_be_streamed(options, message):
    with pytest.raises(ValueError, match=message):
        make_stream(without_cache(), **(SIZES | options))


def test_a_piece_of_nothing_is_refused():
    model = without_cache()
    with pytest.raises(ValueError, match="piece is 0"):
        next(make_stream(model, **SIZES)(model.init(KEY), PROMPTS, KEY, 0, 0))
