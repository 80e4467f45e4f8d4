"""Whitening over the tokens of a batch, and REINFORCE++-baseline."""

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group_normalized, reinforce_plus_plus_baseline, whitened
from jaxrl_llm.statistics import moments

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
GROUP = jnp.array([0, 0, 1, 1])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example_of_whitening():
    values = jnp.array([[0.5, -1, 2, 9], [0, 1, 1.5, -0.5]])
    mask = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    expected = [[0, -1.388730, 1.388730, 0], [-0.462910, 0.462910, 0.925820, -0.925820]]
    np.testing.assert_allclose(whitened(values, mask, jnp.ones(2), eps=1e-6), expected, **DIGITS)


def test_the_result_has_mean_zero_and_variance_one_over_the_tokens_that_count():
    values = jnp.asarray(np.random.default_rng(0).normal(3.0, 5.0, MASK.shape), jnp.float32)
    weight = jnp.array([1.0, 1, 1, 1])
    result = np.asarray(whitened(values, MASK, weight))[np.asarray(MASK) > 0]
    np.testing.assert_allclose(result.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(result.var(ddof=1), 1, rtol=1e-5)


def test_without_centring_only_the_scale_changes():
    values = jnp.asarray(np.random.default_rng(0).normal(3.0, 5.0, MASK.shape), jnp.float32)
    scaled = whitened(values, MASK, jnp.ones(4), center=False)
    _, variance = moments(values, MASK)
    np.testing.assert_allclose(scaled, values * MASK / np.sqrt(variance), rtol=1e-5)


def test_a_row_of_weight_two_counts_as_two_rows_in_the_mean():
    values = jnp.array([[1.0, 2.0], [5.0, 6.0]])
    mean, _ = moments(values, jnp.array([[2.0, 2.0], [1.0, 1.0]]))
    np.testing.assert_allclose(mean, (2 * 1.5 + 5.5) / 3, rtol=1e-6)


def test_equal_advantages_whiten_to_exactly_zero():
    np.testing.assert_array_equal(whitened(jnp.full(MASK.shape, 1000.1), MASK, jnp.ones(4)), 0)
    assert moments(jnp.full(3, 0.1), jnp.ones(3))[1] == 0


def test_worked_example_of_the_group_baseline():
    advantages = reinforce_plus_plus_baseline(jnp.array([1.0, 0, 0, 0]), GROUP, MASK, jnp.ones(4))
    expected = [[1.13707] * 3, [-1.42134, -1.42134, 0], [-0.142134] * 3, [-0.142134, 0, 0]]
    np.testing.assert_allclose(advantages, expected, **DIGITS)


def test_worked_example_of_dler_on_the_groups_that_are_kept():
    advantages = reinforce_plus_plus_baseline(jnp.array([0.0, 1, 0, 0]), GROUP, MASK, jnp.array([1.0, 1, 0, 0]))
    expected = [[-0.730297] * 3, [1.09545, 1.09545, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(advantages, expected, **DIGITS)


def test_it_is_group_centring_then_whitening_and_a_group_of_one_keeps_its_reward():
    rewards = jnp.array([1.0, 0.2, 0.5, 3.0])
    centred = group_normalized(rewards, GROUP, jnp.ones(4), scale="none")
    expected = whitened(jnp.broadcast_to(centred[:, None], MASK.shape), MASK, jnp.ones(4))
    np.testing.assert_array_equal(reinforce_plus_plus_baseline(rewards, GROUP, MASK, jnp.ones(4)), expected)
    alone = reinforce_plus_plus_baseline(rewards, jnp.array([0, 0, 1, 2]), MASK, jnp.ones(4))
    raw = whitened(jnp.array([0.4, -0.4, 0.5, 3.0])[:, None] * jnp.ones((1, 3)), MASK, jnp.ones(4))
    np.testing.assert_allclose(alone, raw, rtol=1e-5)
