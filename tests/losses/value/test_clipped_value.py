"""Regression of the value model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import clipped_value

VALUES = jnp.array([[0.5, 0.1, 0.9, 0], [0.5, 0.6, 0.7, 0.8]])
OLD = jnp.array([[0.2, 0.4, 0.6, 0], [0.5, 0.5, 1, 1.5]])
RETURNS = jnp.array([[1.0, 1, 1, 0], [1.9, 1.8, 2, 2]])
MASK = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])


def test_worked_examples():
    small = clipped_value(jnp.array([[0.5, 0.9]]), jnp.array([[0.2, 0.8]]), jnp.array([[1.0, 0.6]]), jnp.ones((1, 2)))
    np.testing.assert_allclose(small.value, 0.1125, rtol=1e-6)
    large = clipped_value(VALUES, OLD, RETURNS, MASK)
    np.testing.assert_allclose(large.value, 0.552857, rtol=5.5e-6)
    share, count = large.metrics["clip_share"]
    np.testing.assert_allclose(share / count, 0.285714, rtol=5.5e-6)


def test_without_clipping_it_is_half_the_squared_error():
    loss = clipped_value(VALUES, OLD, RETURNS, MASK, clip=None)
    np.testing.assert_allclose(loss.value, 0.5 * (MASK * (VALUES - RETURNS) ** 2).sum() / MASK.sum(), rtol=1e-6)
    assert "clip_share" not in loss.metrics


def test_a_value_that_moved_too_far_towards_its_return_has_no_gradient():
    gradient = jax.grad(lambda v: clipped_value(v, OLD, RETURNS, MASK).value)(VALUES)
    plain = jax.grad(lambda v: clipped_value(v, OLD, RETURNS, MASK, clip=None).value)(VALUES)
    # Tokens [0, 0] and [0, 2] rose by 0.3 towards a return of 1; the others moved less, or away from theirs.
    dropped = np.array([[1, 0, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(np.asarray(gradient)[dropped], 0)
    np.testing.assert_allclose(np.asarray(gradient)[~dropped], np.asarray(plain)[~dropped], rtol=1e-6)


def test_targets_are_constants():
    gradients = jax.grad(lambda old, r: clipped_value(VALUES, old, r, MASK).value, argnums=(0, 1))(OLD, RETURNS)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_a_negative_clip_is_an_error():
    with pytest.raises(ValueError, match=r"clip is -0\.2"):
        clipped_value(VALUES, OLD, RETURNS, MASK, clip=-0.2)
