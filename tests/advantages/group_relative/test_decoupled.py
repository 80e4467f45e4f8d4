"""GDPO: several rewards, normalised apart."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import decoupled_normalized, group_normalized

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
COMPONENTS = jnp.array([[1.0, 0], [0, 0], [1, 1], [0, 0]])
GROUP = jnp.array([0, 0, 1, 1])
WEIGHT = jnp.ones(4)


def test_worked_example():
    summed = decoupled_normalized(COMPONENTS, GROUP, WEIGHT, scale="none")
    np.testing.assert_allclose(summed, [0.707007, -0.707007, 1.41401, -1.41401], **DIGITS)
    advantages = decoupled_normalized(COMPONENTS, GROUP, WEIGHT)
    np.testing.assert_allclose(advantages, [0.54768, -0.54768, 1.09536, -1.09536], **DIGITS)
    merged = group_normalized(COMPONENTS.sum(1), GROUP, WEIGHT, eps=1e-4)
    np.testing.assert_allclose(merged, [0.707007, -0.707007, 0.707057, -0.707057], **DIGITS)


@pytest.mark.parametrize(("samples", "decoupled", "summed"), [(2, 5, 3), (3, 19, 13)])
def test_it_tells_more_reward_patterns_apart_than_the_sum(samples, decoupled, summed):
    patterns = np.array(list(itertools.product((0, 1), repeat=2 * samples)), float).reshape(-1, samples, 2)
    rewards, count = jnp.asarray(patterns.reshape(-1, 2)), len(patterns)
    group, weight = jnp.repeat(jnp.arange(count), samples), jnp.ones(count * samples)

    def distinct(advantages):
        return len({tuple(row) for row in np.round(np.asarray(advantages).reshape(count, samples), 3) + 0.0})

    # An eps that vanishes: what differs by eps only is the same pattern.
    assert distinct(decoupled_normalized(rewards, group, weight, scale="none", eps=1e-9)) == decoupled
    assert distinct(group_normalized(rewards.sum(1), group, weight, eps=1e-9)) == summed


def test_the_scale_of_a_reward_does_not_decide_its_share():
    scaled = decoupled_normalized(COMPONENTS * jnp.array([1.0, 100.0]), GROUP, WEIGHT, eps=1e-6)
    np.testing.assert_allclose(scaled, decoupled_normalized(COMPONENTS, GROUP, WEIGHT, eps=1e-6), rtol=1e-5)


def test_a_missing_reward_takes_part_in_nothing():
    rewards = jnp.array([[1.0, 0.3], [0.0, jnp.nan], [0.5, 0.7], [0.2, 0.1]])
    group = jnp.zeros(4, jnp.int32)
    both = decoupled_normalized(rewards, group, WEIGHT, scale="none")
    first = group_normalized(rewards[:, 0], group, WEIGHT, eps=1e-4)
    known = group_normalized(jnp.array([0.3, 0.7, 0.1]), group[:3], WEIGHT[:3], eps=1e-4)
    np.testing.assert_allclose(both, first + jnp.array([known[0], 0, known[1], known[2]]), rtol=1e-6)
    assert np.isfinite(decoupled_normalized(rewards, group, WEIGHT)).all()


def test_one_reward_is_plain_grpo():
    expected = group_normalized(COMPONENTS[:, 1], GROUP, WEIGHT, eps=1e-4)
    np.testing.assert_array_equal(decoupled_normalized(COMPONENTS[:, 1:], GROUP, WEIGHT), expected)
    watched = decoupled_normalized(COMPONENTS, GROUP, WEIGHT, weights=(0.0, 1.0))
    np.testing.assert_array_equal(watched, expected)


def test_a_weight_counts_a_reward_more():
    ahead = decoupled_normalized(jnp.array([[1.0, 0], [0, 1]]), GROUP[:2], WEIGHT[:2], weights=(2.0, 1.0))
    assert ahead[0] > 0 > ahead[1]


def test_constant_rewards_give_exactly_zero():
    np.testing.assert_array_equal(decoupled_normalized(jnp.full((4, 3), 1000.1), GROUP, WEIGHT), 0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"weights is \(1.0,\), 1 numbers, but there are 2"):
        decoupled_normalized(COMPONENTS, GROUP, WEIGHT, weights=(1.0,))
    with pytest.raises(ValueError, match="scale is 'group'; it must be one of batch, none"):
        decoupled_normalized(COMPONENTS, GROUP, WEIGHT, scale="group")
