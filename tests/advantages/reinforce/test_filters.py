"""StableReinforce's advantage filter."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import sigma_filtered

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
ADVANTAGES = jnp.array([0.0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 12])[:, None]
MASK, WEIGHT = jnp.ones((12, 1)), jnp.ones(12)


def test_worked_example():
    low, high = -0.468521, -0.156174
    expected = [low, high, low, high, high, low, high, low, high, low, high, 0]
    np.testing.assert_allclose(sigma_filtered(ADVANTAGES, MASK, WEIGHT)[:, 0], expected, **DIGITS)


def test_a_wider_limit_keeps_everything():
    everything = sigma_filtered(ADVANTAGES, MASK, WEIGHT, limit=4.0)
    np.testing.assert_allclose(everything.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(everything.std(), 1, rtol=1e-5)


def test_the_released_rule_moves_its_bounds_by_the_mean():
    # The mean of the raw advantages is 1.5, z of the outlier 3.28: inside [-1.5, 4.5], but not inside [-3, 3].
    released = sigma_filtered(ADVANTAGES, MASK, WEIGHT, rule="released")
    np.testing.assert_allclose(released[-1, 0], 3.2797, rtol=1e-4)
    far = sigma_filtered(
        jnp.zeros((400, 1)).at[0].set(1.0), jnp.ones((400, 1)), jnp.ones(400), rule="released", limit=99.0
    )
    assert far[0, 0] == 0  # z is 20
    # A mean far from 0 leaves nothing.
    np.testing.assert_array_equal(sigma_filtered(ADVANTAGES + 50, MASK, WEIGHT, rule="released"), 0)


def test_equal_advantages_give_zero():
    np.testing.assert_array_equal(sigma_filtered(jnp.full((3, 2), 7.3), jnp.ones((3, 2)), jnp.ones(3)), 0)


def test_long_answers_weigh_more():
    mask = jnp.array([[1.0, 1, 1], [1, 0, 0]])
    z = sigma_filtered(jnp.array([[1.0, 1, 1], [0, 0, 0]]), mask, jnp.ones(2))
    np.testing.assert_allclose(z, [[3**-0.5] * 3, [-(3**0.5), 0, 0]], rtol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"rule is 'paper'.*deviations, released"):
        sigma_filtered(ADVANTAGES, MASK, WEIGHT, rule="paper")
    with pytest.raises(ValueError, match=r"limit is 0\.0"):
        sigma_filtered(ADVANTAGES, MASK, WEIGHT, limit=0.0)
