"""Which prompts deserve more rollouts."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.selection import next_rollouts, reward_half_width, rollout_priority

REWARDS = jnp.array([1.0, 0, 0, 1, 1])
GROUP = jnp.zeros(5, jnp.int32)
WEIGHT = jnp.ones(5)


def test_worked_example():
    np.testing.assert_allclose(reward_half_width(REWARDS, GROUP, WEIGHT), 0.680087, rtol=2e-6)
    np.testing.assert_allclose(rollout_priority(REWARDS, GROUP, WEIGHT), 0.105288, rtol=2e-6)


def test_worked_example_of_the_exploration_term():
    # Equal rewards leave the exploration term alone: n = 4 and 8, T = 100.
    group = jnp.array([0] * 4 + [5] * 8)
    priority = rollout_priority(jnp.ones(12), group, jnp.ones(12), jnp.int32(100), exploration=1.0)
    np.testing.assert_allclose(priority, [1.07414] * 4 + [0.759533] * 8, rtol=1e-5)


def test_the_interval_is_that_of_student():
    # t for 95% and 1, 2, 10 degrees of freedom.
    for samples, quantile in ((2, 12.7062), (3, 4.30265), (11, 2.22814)):
        rewards = jnp.asarray(np.random.default_rng(0).normal(size=samples), jnp.float32)
        expected = quantile * np.std(rewards, ddof=1) / np.sqrt(samples)
        width = reward_half_width(rewards, jnp.zeros(samples, jnp.int32), jnp.ones(samples))
        np.testing.assert_allclose(width, expected, rtol=1e-5)


def test_constant_groups_and_groups_of_one_have_no_priority_from_the_interval():
    rewards, group = jnp.array([1.0, 1, 1, 0]), jnp.array([3, 3, 3, 1])
    np.testing.assert_array_equal(rollout_priority(rewards, group, jnp.ones(4)), 0)
    exploring = rollout_priority(rewards, group, jnp.ones(4), exploration=0.5)
    expected = 0.5 * np.sqrt(np.log(5) / np.array([3, 3, 3, 1]))
    np.testing.assert_allclose(exploring, expected, rtol=1e-6)


def test_rollouts_go_where_the_interval_shrinks_most():
    rewards = jnp.array([1.0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0])
    group = jnp.array([7] * 2 + [2] * 4 + [0] * 6)
    given = np.asarray(next_rollouts(rewards, group, jnp.ones(12), rollouts=9))
    assert given.sum() == 9
    assert given[0] > given[6] > 0
    assert given[2] == 0
    np.testing.assert_array_equal(np.delete(given, [0, 2, 6]), 0)


def test_each_rollout_counts_in_the_next_comparison():
    # The first goes to the prompt with 2 samples; one at a time, the result is the same as in a single round.
    rewards, group = jnp.array([1.0, 0, 1, 0, 1, 0]), jnp.array([0, 0, 4, 4, 4, 4])
    counts = {0: 2, 4: 4}
    deviation = {0: np.std([1, 0], ddof=1), 4: np.std([1, 0, 1, 0], ddof=1)}
    quantile = {2: 12.706205, 3: 4.302653, 4: 3.182446, 5: 2.776445, 6: 2.570582, 7: 2.446912, 8: 2.364624}

    def drop(g):
        n = counts[g]
        return deviation[g] * (quantile[n] / n**0.5 - quantile[n + 1] / (n + 1) ** 0.5)

    for _ in range(4):
        counts[max(counts, key=drop)] += 1
    given = next_rollouts(rewards, group, jnp.ones(6), rollouts=4)
    np.testing.assert_array_equal(given, [counts[0] - 2, 0, counts[4] - 4, 0, 0, 0])


@pytest.mark.parametrize("exploration", [0.0, 1.0])
def test_prompts_of_equal_rewards_get_even_shares(exploration):
    group = jnp.array([0, 0, 4, 4, 3])  # the last prompt catches up first
    given = next_rollouts(jnp.ones(5), group, jnp.ones(5), rollouts=7, exploration=exploration)
    np.testing.assert_array_equal(given, [2, 0, 2, 0, 3])


def test_an_empty_batch_asks_for_nothing():
    assert next_rollouts(REWARDS, GROUP, jnp.zeros(5), rollouts=3).sum() == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reward_half_width(REWARDS, GROUP, WEIGHT, confidence=1.0), "confidence is 1.0"),
        (lambda: rollout_priority(REWARDS, GROUP, WEIGHT, exploration=-1.0), "exploration is -1.0"),
        (lambda: next_rollouts(REWARDS, GROUP, WEIGHT, rollouts=-1), "rollouts is -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
