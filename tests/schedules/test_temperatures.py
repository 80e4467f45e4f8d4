"""The temperature of extra answers follows the entropy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.schedules import steering_temperature, temperature_controller

MASK, WEIGHT = jnp.ones((8, 1)), jnp.ones(8)


def test_worked_example_of_temperatures():
    temperatures = [float(steering_temperature(h)) for h in (0.3, 0.7)]
    np.testing.assert_allclose(temperatures, [1.2, 0.8], rtol=1e-6)


def test_the_controller_draws_hotter_below_the_target_and_colder_above():
    method = temperature_controller(target=0.5)
    memory = method.init()
    assert memory["entropy"] == 0
    for entropy, temperature in ((0.3, 1.2), (0.8, 0.8), (0.4, 1.2)):
        value, memory = method.update(memory, jnp.full((8, 1), -entropy), MASK, WEIGHT)
        assert value == pytest.approx(temperature)
        assert memory["entropy"] == pytest.approx(entropy)


def test_temperatures_out_of_order_are_named():
    with pytest.raises(ValueError, match=r"cold is 1.2 and hot is 1.2"):
        temperature_controller(cold=1.2)
