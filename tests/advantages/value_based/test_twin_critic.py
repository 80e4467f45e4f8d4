"""SAFE: the soft minimum of two critics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import soft_minimum, twin_baseline_normalized


def test_worked_example():
    np.testing.assert_allclose(soft_minimum(jnp.array(1.0), jnp.array(2.0)), 1.19743, rtol=5e-6)


def test_it_lies_between_minimum_and_mean():
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=50), jnp.float32) for _ in range(2))
    value = soft_minimum(first, second)
    assert (value <= (first + second) / 2 + 1e-6).all()
    assert (value >= jnp.minimum(first, second) - 1e-6).all()
    np.testing.assert_allclose(soft_minimum(first, second, temperature=1e-3), jnp.minimum(first, second), atol=1e-3)
    np.testing.assert_allclose(soft_minimum(first, second, temperature=1e3), (first + second) / 2, atol=4e-3)
    np.testing.assert_allclose(soft_minimum(first, first), first, atol=1e-6)


def test_far_apart_critics_have_a_finite_value_and_gradient():
    for other in (1e4, -1e4, 0.0):
        gradient = jax.grad(soft_minimum, argnums=(0, 1))(jnp.float32(0.0), jnp.float32(other))
        np.testing.assert_allclose(np.sum(gradient), 1.0, rtol=1e-6)


def test_the_advantage_is_whitened_over_rows():
    rewards, values = jnp.array([1.0, 0, 0.5, 2]), jnp.array([[0.2, 0.4], [0.3, 0.1], [1.0, 1.0], [0.0, 3.0]])
    expected = np.asarray(rewards - soft_minimum(values[:, 0], values[:, 1]), np.float64)
    expected = (expected - expected.mean()) / (expected.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(twin_baseline_normalized(rewards, values, jnp.ones(4)), expected, rtol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        twin_baseline_normalized(jnp.ones(2), jnp.ones((2, 2)), jnp.ones(2), temperature=0.0)
    with pytest.raises(AssertionError):
        twin_baseline_normalized(jnp.ones(2), jnp.ones((2, 3)), jnp.ones(2))
