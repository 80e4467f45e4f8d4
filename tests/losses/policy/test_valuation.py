"""Regression on the value of the random policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import mean_log_ratio, policy_gradient, random_policy_valuation

SCORES = jnp.array([[[1.0, 0, 0], [0, 1, 0]]])
OLD_SCORES = jnp.array([[[0.5, 0, 0], [0, 0.5, 0.5]]])
TOKENS = jnp.array([[0, 1]])
ADVANTAGES = jnp.full((1, 2), 0.5)
MASK = jnp.ones((1, 2))


def loss(scores, old_scores=OLD_SCORES, advantages=ADVANTAGES, mask=MASK, **hyper):
    log_p, log_q = jax.nn.log_softmax(scores), jax.nn.log_softmax(old_scores)
    taken = lambda x: jnp.take_along_axis(x, TOKENS[..., None], -1)[..., 0]  # noqa: E731
    configured = random_policy_valuation(**hyper)
    functional = configured.over_vocabulary(log_p, log_q)
    return configured(taken(log_p), taken(log_q), advantages, mask, functional).value


def test_worked_example():
    value, gradient = jax.value_and_grad(loss)(SCORES)
    np.testing.assert_allclose(value, 0.0177536, rtol=5.5e-6)
    expected = [[[-0.0693656, 0.0346828, 0.0346828], [0.0198006, -0.0396011, 0.0198006]]]
    np.testing.assert_allclose(gradient, expected, rtol=5.5e-6, atol=1e-7)


def test_on_fresh_samples_it_is_reinforce():
    def reinforce(scores):
        taken = jnp.take_along_axis(jax.nn.log_softmax(scores), TOKENS[..., None], -1)[..., 0]
        return policy_gradient(taken, ADVANTAGES, MASK).value

    expected = jax.grad(reinforce)(OLD_SCORES)
    np.testing.assert_allclose(jax.grad(loss)(OLD_SCORES), 2 * expected, rtol=1e-5, atol=1e-7)
    scaled = jax.grad(lambda x: loss(x, scale=3.0))(OLD_SCORES)
    np.testing.assert_allclose(scaled, 6 * expected, rtol=1e-5, atol=1e-7)


def test_the_next_value_stops_at_the_end_of_the_answer():
    alone = jax.value_and_grad(lambda x: loss(x, mask=jnp.array([[1.0, 0]])))(SCORES)
    other = jax.value_and_grad(lambda x: loss(x, mask=jnp.array([[1.0, 0]])))(SCORES.at[0, 1].set(7.0))
    assert alone[0] == other[0]
    np.testing.assert_array_equal(alone[1][0, 1], 0)
    log_ratio = jax.nn.log_softmax(SCORES)[0, 0, 0] - jax.nn.log_softmax(OLD_SCORES)[0, 0, 0]
    np.testing.assert_allclose(alone[0], (log_ratio - 0.5) ** 2, rtol=1e-5)


def test_no_gradient_runs_through_the_next_value():
    following = jnp.array([[0.3, -0.8]])
    gradient = jax.grad(lambda c: random_policy_valuation()(MASK, MASK, ADVANTAGES, MASK, c).value)(following)
    np.testing.assert_array_equal(gradient, 0)


def test_the_mean_log_ratio_is_finite_with_impossible_symbols():
    log_p = jnp.array([0.0, -jnp.inf])
    log_q = jnp.log(jnp.array([0.5, 0.5]))
    assert np.isfinite(mean_log_ratio(log_p, log_q))
    assert np.isfinite(jax.grad(lambda x: mean_log_ratio(x, log_q))(log_p)).all()
    np.testing.assert_allclose(mean_log_ratio(log_q, jnp.log(jnp.array([0.25, 0.75]))), np.log(4 / 3) / 2, rtol=1e-6)


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match=r"scale is 0.0"):
        random_policy_valuation(scale=0.0)
    with pytest.raises(ValueError, match=r"aggregation is 'mean'"):
        random_policy_valuation(aggregation="mean")
