"""RLCR's reward."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import calibrated_correctness

CORRECT, CONFIDENCE = jnp.array([1.0, 0, 1, 1]), jnp.array([0.8, 0.8, 0.1, 1.7])
RELEASED = {"format_weight": 0.5, "accuracy_weight": 0.5, "calibration_weight": 0.5, "offset": 1.0}


def test_worked_example():
    np.testing.assert_allclose(calibrated_correctness(CORRECT, CONFIDENCE), [0.96, -0.64, 0.19, -1], rtol=1e-6)
    released = calibrated_correctness(CORRECT, CONFIDENCE, **RELEASED)
    np.testing.assert_allclose(released, [1.48, 0.68, 1.095, 0], rtol=1e-6, atol=1e-7)


def test_the_brier_score_alone():
    found = calibrated_correctness(jnp.array([1.0, 0, 0]), jnp.array([0.8, 0.8, 0.1]), accuracy_weight=0.0)
    np.testing.assert_allclose(found, [-0.04, -0.64, -0.01], rtol=1e-5)


def test_no_confidence_that_can_be_read_is_worse_than_none():
    for setting in ({}, RELEASED):
        unread = calibrated_correctness(jnp.array([1.0]), jnp.array([jnp.nan]), **setting)
        grid = jnp.linspace(0, 1, 21)
        worst = min(calibrated_correctness(jnp.full(21, c), grid, **setting).min() for c in (0.0, 1.0))
        assert np.isfinite(unread[0])
        assert unread[0] <= worst


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_the_honest_confidence_earns_most(share):
    grid = jnp.linspace(0, 1, 21)
    right, wrong = (calibrated_correctness(jnp.full(21, c), grid) for c in (1.0, 0.0))
    np.testing.assert_allclose(grid[jnp.argmax(share * right + (1 - share) * wrong)], share, atol=1e-6)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="calibration_weight is -1; it must be at least 0"):
        calibrated_correctness(CORRECT, CONFIDENCE, calibration_weight=-1)
    with pytest.raises(AssertionError):
        calibrated_correctness(CORRECT, CONFIDENCE[:2])
