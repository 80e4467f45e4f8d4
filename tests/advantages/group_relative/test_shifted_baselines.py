"""Baselines that are not the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import amplified_gains, group_normalized, log_mean_exp_baseline, shifted_mean_baseline

REWARDS = jnp.array([1.0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1])
GROUP = jnp.repeat(jnp.arange(3), 4)
WEIGHT = jnp.ones(12)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example_of_opmd():
    expected = [
        [0.379885, -0.620115, -0.620115, 0.379885],
        [-0.357374, -0.357374, 0.642626, -0.357374],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(log_mean_exp_baseline(REWARDS, GROUP, WEIGHT).reshape(3, 4), expected, **DIGITS)


def test_worked_example_of_asymre():
    expected = [[0.6, -0.4, -0.4, 0.6], [-0.15, -0.15, 0.85, -0.15], [0.1] * 4]
    np.testing.assert_allclose(shifted_mean_baseline(REWARDS, GROUP, WEIGHT).reshape(3, 4), expected, **DIGITS)


def test_worked_example_of_r3l():
    rewards = jnp.array([1.0, 0, 0, 0.5, 0.6, 0.2, 0.1, 0.3, 1.0])
    found = amplified_gains(rewards, jnp.array([0] * 4 + [1] * 4 + [2]), jnp.ones(9))
    np.testing.assert_allclose(found, [1, -0.375, -0.375, 0.375, 0.9, -0.1, -0.2, 0, 1], atol=1e-6)


def test_the_temperature_runs_from_the_best_answer_to_the_mean():
    centred = group_normalized(REWARDS, GROUP, WEIGHT, scale="none")
    np.testing.assert_allclose(log_mean_exp_baseline(REWARDS, GROUP, WEIGHT, temperature=1e4), centred, atol=2e-3)
    cold = log_mean_exp_baseline(REWARDS, GROUP, WEIGHT, temperature=1e-3)
    np.testing.assert_allclose(cold, REWARDS - 1, atol=2e-3)


def test_without_a_shift_it_is_the_mean():
    plain = group_normalized(REWARDS, GROUP, WEIGHT, scale="none")
    np.testing.assert_array_equal(shifted_mean_baseline(REWARDS, GROUP, WEIGHT, shift=0.0), plain)


def test_extreme_rewards_are_finite():
    for scale in (1e4, -1e4):
        assert np.isfinite(log_mean_exp_baseline(scale * REWARDS, GROUP, WEIGHT)).all()
        gradient = jax.grad(lambda r: (log_mean_exp_baseline(r, GROUP, WEIGHT) ** 2).sum())(scale * REWARDS)
        assert np.isfinite(gradient).all()


def test_a_temperature_of_zero_is_named():
    with pytest.raises(ValueError, match=r"temperature is 0.0"):
        log_mean_exp_baseline(REWARDS, GROUP, WEIGHT, temperature=0.0)
