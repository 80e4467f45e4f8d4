"""The chunked pass: the numbers and gradients of a direct log-softmax, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxrl_llm.models import (
    TransformerConfig,
    entropy_of,
    positions_per_chunk,
    scaled_log_softmax,
    token_statistics,
    transformer,
)
from jaxrl_llm.models.logprobs import SCORES_PER_CHUNK, Other

ROWS, LENGTH, VOCABULARY, WIDTH = 3, 7, 11, 16
MODEL = transformer(
    TransformerConfig(vocabulary_size=VOCABULARY, width=WIDTH, layers=1, heads=2, kv_heads=1, tie_embeddings=False)
)


def reverse_kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def squared_difference(log_p, log_q):
    return jnp.sum(jnp.square(log_p - log_q), axis=-1)


@functools.cache
def data():
    keys = jax.random.split(jax.random.key(0), 6)
    table = lambda key: {"unembedding": jax.random.normal(key, (VOCABULARY, WIDTH)), "embedding": jnp.zeros((1, 1))}  # noqa: E731
    hidden = lambda key: jax.random.normal(key, (ROWS, LENGTH, WIDTH))  # noqa: E731
    tokens = jax.random.randint(keys[4], (ROWS, LENGTH), 0, VOCABULARY)
    weights = jax.random.normal(keys[5], (4, ROWS, LENGTH))
    return table(keys[0]), hidden(keys[1]), table(keys[2]), hidden(keys[3]), tokens, weights


def chunked(params, hidden, reference_params, reference_hidden, tokens, *, temperature, chunk):
    statistics = token_statistics(
        MODEL,
        params,
        hidden,
        tokens,
        temperature=temperature,
        entropy=True,
        others=(Other(MODEL, reference_params, reference_hidden, (reverse_kl, squared_difference)),),
        chunk=chunk,
    )
    return jnp.stack([statistics.logprobs, statistics.entropy, *statistics.over_vocabulary])


def direct(params, hidden, reference_params, reference_hidden, tokens, *, temperature, chunk=None):
    scores = lambda p, h: jnp.einsum("btd,vd->btv", h, p["unembedding"]) / temperature  # noqa: E731
    log_p = jax.nn.log_softmax(scores(params, hidden))
    log_q = jax.lax.stop_gradient(jax.nn.log_softmax(scores(reference_params, reference_hidden)))
    picked = jnp.sum(jnp.where(jnp.arange(VOCABULARY) == tokens[..., None], log_p, 0.0), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.stack([picked, entropy, reverse_kl(log_p, log_q), squared_difference(log_p, log_q)])


@functools.cache
def differentiated(function, chunk=None):
    """Each statistic, and the gradient of a random combination of them all, so that none can hide behind another."""
    tokens, weights = data()[4:]

    @jax.jit
    def value_and_gradient(temperature, *arguments):
        def objective(*arguments):
            values = function(*arguments, tokens, temperature=temperature, chunk=chunk)
            return jnp.sum(weights * values), values

        return jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)

    return value_and_gradient


@functools.cache
def values_and_gradients(function, temperature, chunk=None):
    (_, values), gradients = differentiated(function, chunk)(temperature, *data()[:4])
    return values, gradients


@pytest.mark.parametrize("temperature, chunk", [(0.7, 1), (0.7, 3), (0.7, LENGTH), (0.7, LENGTH + 5), (1.0, 3)])
def test_values_and_gradients_equal_the_direct_computation(temperature, chunk):
    values, gradients = values_and_gradients(chunked, temperature, chunk)
    expected_values, expected_gradients = values_and_gradients(direct, temperature)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)
    of_policy, of_reference = jax.tree.leaves(gradients[:2]), jax.tree.leaves(gradients[2:])
    assert max(float(jnp.abs(g).max()) for g in of_policy) > 0.1
    assert all(not bool(g.any()) for g in of_reference)


def test_temperature_is_not_ignored():
    warm, cold = values_and_gradients(chunked, 1.0, 3)[0], values_and_gradients(chunked, 0.7, 3)[0]
    assert (cold[1] < warm[1]).all()


def test_what_is_not_asked_for_is_not_returned():
    params, hidden, _, _, tokens, _ = data()
    for chunk in (3, LENGTH):
        statistics = token_statistics(MODEL, params, hidden, tokens, chunk=chunk)
        assert statistics.entropy is None
        assert statistics.over_vocabulary == ()
        np.testing.assert_allclose(statistics.logprobs, values_and_gradients(direct, 1.0)[0][0], rtol=1e-5, atol=1e-5)


def test_bfloat16_hidden_states_give_float32_statistics():
    params, hidden, reference_params, reference_hidden, tokens, _ = data()
    low = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    values = chunked(params, low(hidden), reference_params, low(reference_hidden), tokens, temperature=0.7, chunk=3)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values[0], values_and_gradients(direct, 0.7)[0][0], rtol=0.05, atol=0.3)


def avals(jaxpr):
    """Shape of every array in a program, also inside loops, checkpoints and other nested programs."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if hasattr(variable.aval, "shape"):
                yield variable.aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    inner = inner.jaxpr
                if isinstance(inner, core.Jaxpr):
                    yield from avals(inner)


def test_no_array_over_all_positions_and_the_vocabulary_exists():
    rows, length, vocabulary, chunk = 4, 66, 211, 5
    model = transformer(TransformerConfig(vocabulary_size=vocabulary, width=16, layers=1, heads=2, kv_heads=1))
    params = {"embedding": jnp.ones((vocabulary, 16))}
    hidden, tokens = jnp.ones((rows, length, 16)), jnp.zeros((rows, length), jnp.int32)

    def objective(params, hidden, chunk):
        statistics = token_statistics(
            model,
            params,
            hidden,
            tokens,
            entropy=True,
            others=(Other(model, params, hidden, (reverse_kl,)),),
            chunk=chunk,
        )
        return sum(x.sum() for x in (statistics.logprobs, statistics.entropy, *statistics.over_vocabulary))

    def largest(function, chunk):
        program = jax.make_jaxpr(function, static_argnums=2)(params, hidden, chunk)
        with_vocabulary = [shape for shape in avals(program.jaxpr) if vocabulary in shape]
        return max(int(np.prod(shape)) for shape in with_vocabulary)

    gradient = jax.grad(objective, argnums=(0, 1))
    everything, table = rows * length * vocabulary, vocabulary * 16
    for function in (objective, gradient):
        assert largest(function, length) >= everything  # the inspection finds the array when it is there
        assert largest(function, chunk) == max(rows * chunk * vocabulary, table)

    def temporary_bytes(chunk):
        compiled = jax.jit(gradient, static_argnums=2).lower(params, hidden, chunk).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(chunk) < 4 * everything / 2 < temporary_bytes(length)


def test_chunks_hold_a_bounded_number_of_scores():
    for rows, positions, vocabulary in [(1, 1, 11), (64, 1024, 151_936), (4096, 7, 2**20), (8, 32, 100)]:
        chunk = positions_per_chunk(rows, positions, vocabulary)
        assert 1 <= chunk <= positions
        assert chunk == 1 or rows * chunk * vocabulary <= SCORES_PER_CHUNK
        assert chunk == positions or rows * (chunk + 1) * vocabulary > SCORES_PER_CHUNK


def test_entropy_of_known_distributions():
    probabilities = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.7, 0.2, 0.1, 0]])
    with np.errstate(divide="ignore"):
        entropy = entropy_of(jnp.asarray(np.log(probabilities), jnp.float32))
    np.testing.assert_allclose(entropy, [np.log(4), np.log(2), 0.0, 0.801819], atol=1e-6)


def test_entropy_and_gradient_are_finite_with_impossible_symbols():
    scores = jnp.array(
        [[0.3, -jnp.inf, 1.2, -jnp.inf], [-jnp.inf, 0.0, -jnp.inf, -jnp.inf], [0.0, -300.0, 200.0, -jnp.inf]]
    )
    entropy = lambda x: entropy_of(scaled_log_softmax(x, 0.7))  # noqa: E731
    values, gradient = entropy(scores), jax.grad(lambda x: entropy(x).sum())(scores)
    assert bool(jnp.isfinite(values).all())
    assert bool(jnp.isfinite(gradient).all())
    # The first row is a choice between two: H = -sum p log p, dH/ds_i = -p_i (log p_i + H) / temperature.
    p = np.exp(np.array([0.3, 1.2]) / 0.7)
    p /= p.sum()
    expected = -(p * np.log(p)).sum()
    np.testing.assert_allclose(values, [expected, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(gradient[0, [0, 2]], -p * (np.log(p) + expected) / 0.7, atol=1e-6)
    np.testing.assert_allclose(gradient[0, [1, 3]], 0.0)
    np.testing.assert_allclose(gradient[1:], 0.0, atol=1e-6)


def test_scaled_log_softmax_is_float32_and_divides_by_the_temperature():
    scores = jnp.array([[1.0, 2.0, 4.0]], jnp.bfloat16)
    ours = scaled_log_softmax(scores, 0.5)
    assert ours.dtype == jnp.float32
    shifted = np.array([2.0, 4.0, 8.0])
    np.testing.assert_allclose(ours[0], shifted - np.log(np.exp(shifted).sum()), rtol=1e-6)
    per_row = scaled_log_softmax(jnp.tile(scores, (2, 1)), jnp.array([[0.5], [1.0]]))
    np.testing.assert_allclose(per_row[0], ours[0], rtol=1e-6)
    np.testing.assert_allclose(per_row[1], jax.nn.log_softmax(jnp.array([1.0, 2.0, 4.0])), rtol=1e-6)
