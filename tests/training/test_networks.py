"""Networks that follow the policy at a distance."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training.networks import ema


def test_worked_example():
    np.testing.assert_allclose(ema(jnp.array([1.0, -1]), jnp.array([0.0, 1]), decay=0.99), [0.01, 0.98], rtol=1e-6)


def test_it_works_on_trees_and_keeps_the_dtype_of_the_anchor():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": (jnp.full(3, 4.0),)}
    anchor = {"a": jnp.zeros(2, jnp.float32), "b": (jnp.zeros(3, jnp.bfloat16),)}
    moved = ema(params, anchor, decay=0.75)
    assert moved["a"].dtype == jnp.float32
    assert moved["b"][0].dtype == jnp.bfloat16
    np.testing.assert_allclose(moved["a"], 0.25)
    np.testing.assert_allclose(moved["b"][0].astype(jnp.float32), 1.0)


def test_it_ends_at_a_policy_that_stands_still():
    anchor = jnp.zeros(1)
    for _ in range(100):
        anchor = ema(jnp.array([3.0]), anchor, decay=0.9)
    np.testing.assert_allclose(anchor, 3 * (1 - 0.9**100), rtol=1e-5)
    np.testing.assert_array_equal(ema(jnp.array([3.0]), anchor, decay=1.0), anchor)


def test_a_decay_that_is_no_share_is_named():
    with pytest.raises(ValueError, match=r"decay is 1.5"):
        ema(jnp.zeros(1), jnp.zeros(1), decay=1.5)
