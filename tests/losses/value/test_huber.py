"""SAFE's value loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import huber_value

MASK = jnp.ones((1, 1))


def loss(value, old=0.0, target=1.0, **hyper):
    one = lambda x: jnp.full((1, 1), x)  # noqa: E731
    return huber_value(one(value), one(old), one(target), MASK, **hyper).value


def huber(error):
    return 0.5 * error**2 if abs(error) <= 0.5 else 0.5 * (abs(error) - 0.25)


@pytest.mark.parametrize("value", [-3.0, 0.1, 0.7, 0.9, 1.2, 40.0])
def test_it_is_half_the_plain_and_half_the_clipped_error(value):
    expected = 0.5 * (huber(value - 1) + huber(np.clip(value, -0.2, 0.2) - 1))
    np.testing.assert_allclose(loss(value), expected, rtol=1e-6)


def test_the_gradient_is_bounded_and_halves_beyond_the_clip():
    slope = jax.grad(loss)
    np.testing.assert_allclose([slope(0.1), slope(-1e6), slope(1e6)], [-0.5, -0.25, 0.25], rtol=1e-6)
    # On the target, beyond the clip, nothing pulls.
    assert slope(1.0) == 0


def test_a_wide_delta_and_clip_is_the_squared_error():
    np.testing.assert_allclose(loss(3.0, delta=100.0, clip=100.0), 2.0, rtol=1e-6)


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match=r"delta is 0\.0"):
        loss(1.0, delta=0.0)
    with pytest.raises(ValueError, match=r"clip is -0\.1"):
        loss(1.0, clip=-0.1)
