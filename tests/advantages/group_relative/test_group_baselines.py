"""GRPO, Dr.GRPO, RLOO and OPO."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import group_normalized, leave_one_out, length_weighted_baseline

REWARDS = jnp.array([1.0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1])
GROUP = jnp.repeat(jnp.arange(3), 4)
WEIGHT = jnp.ones(12)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}

GOLDENS = {
    "group": [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, -0.499999, 1.5, -0.499999, 0, 0, 0, 0],
    "batch": [0.971006, -0.971006, -0.971006, 0.971006, -0.485503, -0.485503, 1.45651, -0.485503, 0, 0, 0, 0],
    "none": [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, 0.75, -0.25, 0, 0, 0, 0],
}


@pytest.mark.parametrize("scale", GOLDENS)
def test_worked_example_of_grpo(scale):
    np.testing.assert_allclose(group_normalized(REWARDS, GROUP, WEIGHT, scale=scale), GOLDENS[scale], **DIGITS)


def test_worked_example_of_rloo():
    expected = [2 / 3, -2 / 3, -2 / 3, 2 / 3, -1 / 3, -1 / 3, 1, -1 / 3, 0, 0, 0, 0]
    np.testing.assert_allclose(leave_one_out(REWARDS, GROUP, WEIGHT), expected, **DIGITS)


def test_worked_example_of_opo():
    length = jnp.array([2, 4, 6, 8, 1, 1, 3, 5, 2, 2, 2, 2])
    expected = [0.5, -0.5, -0.5, 0.5, -0.3, -0.3, 0.7, -0.3, 0, 0, 0, 0]
    np.testing.assert_allclose(length_weighted_baseline(REWARDS, length, GROUP, WEIGHT), expected, **DIGITS)


def test_opo_with_equal_lengths_is_dr_grpo():
    same = length_weighted_baseline(REWARDS, jnp.full(12, 7), GROUP, WEIGHT)
    np.testing.assert_allclose(same, group_normalized(REWARDS, GROUP, WEIGHT, scale="none"), rtol=1e-6, atol=1e-7)


def test_rloo_is_the_reward_minus_the_mean_of_the_others():
    rewards = jnp.array([0.3, 2.0, -1.0, 4.0, 0.5])
    group = jnp.array([2, 2, 0, 2, 0])
    expected = [0.3 - 3.0, 2.0 - 2.15, -1.5, 4.0 - 1.15, 1.5]
    np.testing.assert_allclose(leave_one_out(rewards, group, jnp.ones(5)), expected, rtol=1e-6, atol=1e-6)


def test_the_leave_one_out_baseline_is_unbiased_and_removes_the_variance_of_a_common_reward():
    # A coin with p = 0.7 and rewards c + 1 and c: enumerate all batches of three samples.
    p = 0.7
    coins = np.array([[(code >> i) & 1 for i in range(3)] for code in range(8)], float)
    chances = np.where(coins == 1, p, 1 - p).prod(1)
    score = coins - p  # gradient of the log-probability by the logit
    variance = {}
    for common in (0.0, 5.0):
        rewards = coins + common
        group, weight = jnp.repeat(jnp.arange(8), 3), jnp.ones(24)
        advantages = np.asarray(leave_one_out(jnp.asarray(rewards.ravel()), group, weight)).reshape(8, 3)
        for method, signal in (("rloo", advantages), ("plain", rewards)):
            gradient = (signal * score).mean(1)
            np.testing.assert_allclose(chances @ gradient, p * (1 - p), rtol=1e-5)
            variance[method, common] = chances @ np.square(gradient - p * (1 - p))
    np.testing.assert_allclose(variance["rloo", 0.0], variance["rloo", 5.0], rtol=1e-4)
    assert variance["plain", 5.0] > 10 * variance["rloo", 5.0]


def test_group_scale_pushes_rare_successes_harder_and_dr_grpo_less():
    rewards = jnp.array([1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    group = jnp.repeat(jnp.arange(2), 8)
    scaled = group_normalized(rewards, group, jnp.ones(16))
    centred = group_normalized(rewards, group, jnp.ones(16), scale="none")
    size = lambda a, g: np.abs(np.asarray(a)[np.asarray(group) == g]).sum()  # noqa: E731
    assert size(centred, 0) / size(centred, 1) < size(scaled, 0) / size(scaled, 1)


def test_equal_rewards_give_exactly_zero_however_large():
    for value in (0.1, 1000.1, 12345.678):
        for advantages in (
            group_normalized(jnp.full(12, value), GROUP, WEIGHT, eps=0.0001),
            leave_one_out(jnp.full(12, value), GROUP, WEIGHT),
        ):
            np.testing.assert_array_equal(advantages, 0)


def test_population_deviation_is_an_option():
    biased = group_normalized(REWARDS[:4], GROUP[:4], WEIGHT[:4], ddof=0, eps=0.0)
    np.testing.assert_allclose(biased, [1, -1, -1, 1], rtol=1e-6)


def test_an_unknown_scale_is_an_error():
    with pytest.raises(ValueError, match=r"scale is 'std'.*group, batch, none"):
        group_normalized(REWARDS, GROUP, WEIGHT, scale="std")
