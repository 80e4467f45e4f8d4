"""Weights of reward components."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import weighted_sum


def test_weighted_sum():
    components = jnp.asarray([[1.0, 0.5], [0.0, 1.0]])
    np.testing.assert_allclose(weighted_sum(components, weights=(1.0, 0.2)), [1.1, 0.2], rtol=1e-6)


def test_a_component_of_weight_zero_changes_nothing():
    components = jnp.asarray([[1.0, jnp.nan], [0.0, jnp.inf]])
    assert weighted_sum(components, weights=(2.0, 0.0)).tolist() == [2.0, 0.0]


def test_what_does_not_apply_is_left_out_of_the_sum():
    nan = jnp.nan
    components = jnp.asarray([[1.0, nan, 5.0], [nan, 2.0, nan], [nan, nan, 5.0], [nan, nan, nan]])
    assert weighted_sum(components, weights=(1.0, 0.5, 0.0)).tolist()[:2] == [1.0, 1.0]
    assert np.isnan(weighted_sum(components, weights=(1.0, 0.5, 0.0))[2:]).all()
    # Where all are watched and none counts, a row has one of them, or none.
    watched = weighted_sum(components, weights=(0.0, 0.0, 0.0))
    assert watched[:3].tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(watched[3])


def test_statistics_are_float32_for_bfloat16_input():
    assert weighted_sum(jnp.ones((2, 1), jnp.bfloat16), weights=(0.1,)).dtype == jnp.float32


def test_one_weight_a_component():
    with pytest.raises(ValueError, match="2 reward components"):
        weighted_sum(jnp.ones((2, 2)), weights=(1.0,))
