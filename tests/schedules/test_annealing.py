"""Coefficients that fall with the steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.schedules import annealed_share, two_phase_decay


def test_the_share_falls_in_steps_to_its_floor():
    shares = [float(annealed_share(s, scale=1.0)) for s in (0, 50, 51, 60, 61, 100, 1000)]
    np.testing.assert_allclose(shares, [1, 1, 0.9, 0.9, 0.8, 0.5, 0.5], rtol=1e-6)
    for step in (0, 55, 1000):
        total = annealed_share(jnp.int32(step)) + annealed_share(jnp.int32(step), complement=True)
        np.testing.assert_allclose(total, 0.01, rtol=1e-6)


def test_worked_example_of_two_phases():
    weights = [two_phase_decay(jnp.int32(step)) for step in (10, 75, 120)]
    np.testing.assert_allclose(weights, [0.953186, 0.827067, 0.132239], rtol=5.5e-6, atol=1e-6)


def test_the_schedule_only_falls_and_scales():
    values = np.array([two_phase_decay(jnp.int32(e), total_steps=40, scale=0.001) for e in range(41)])
    assert (np.diff(values) < 0).all()
    np.testing.assert_allclose(values[[0, -1]], [0.001, 0.001 * 0.8 * np.exp(-3)], rtol=1e-5)


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match="total_steps is 1"):
        two_phase_decay(jnp.int32(0), total_steps=1)
    with pytest.raises(ValueError, match=r"least is 2\.0"):
        annealed_share(0, least=2.0)
