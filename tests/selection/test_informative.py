"""Rows that have something to teach: the filter of dynamic sampling, and rows that speak."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.selection import nonconstant_groups, nonzero_advantages


def test_worked_example_of_dapo():
    rewards = jnp.array([1.0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1])
    kept = nonconstant_groups(rewards, jnp.repeat(jnp.arange(3), 4), jnp.ones(12))
    np.testing.assert_array_equal(kept.reshape(3, 4).mean(1), [1, 1, 0])


def test_groups_of_one_and_weights_are_kept_and_absent_rows_do_not_vote():
    rewards = jnp.array([0.5, 1.0, 0.0, 1.0, 1.0, 0.0])
    group = jnp.array([5, 0, 0, 2, 2, 2])
    weight = jnp.array([1.0, 0.5, 2.0, 1.0, 1.0, 0.0])
    np.testing.assert_array_equal(nonconstant_groups(rewards, group, weight), [1, 0.5, 2, 0, 0, 0])


def test_rewards_within_the_tolerance_count_as_equal():
    rewards, group = jnp.array([1.0, 1.05, 1.0, 1.5]), jnp.array([0, 0, 1, 1])
    np.testing.assert_array_equal(nonconstant_groups(rewards, group, jnp.ones(4), tolerance=0.1), [0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"tolerance is -1"):
        nonconstant_groups(rewards, group, jnp.ones(4), tolerance=-1)


def test_what_stands_outside_the_mask_does_not_keep_a_row():
    advantages, mask = jnp.array([[0.0, 5.0], [0.0, -1.0]]), jnp.array([[1.0, 0], [1, 1]])
    np.testing.assert_array_equal(nonzero_advantages(advantages, mask, jnp.ones(2)), [0, 1])
