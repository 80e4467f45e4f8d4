"""Advantages scaled by a Beta density of success rates."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import beta_normalized, beta_normalized_components, group_normalized

REWARDS = jnp.array([1.0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0])
GROUP = jnp.repeat(jnp.array([2, 0, 7]), 4)
WEIGHT = jnp.ones(12)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example():
    expected = [
        [0.392699, -0.392699, -0.392699, 0.392699],
        [-0.226725, -0.226725, 0.680175, -0.226725],
        [0.226725, 0.226725, 0.226725, -0.680175],
    ]
    np.testing.assert_allclose(beta_normalized(REWARDS, GROUP, WEIGHT).reshape(3, 4), expected, **DIGITS)


def test_a_beta_of_three_halves_is_grpo_with_the_population_deviation():
    # Success rates 1/2, 1/4, 3/4 have mean 1/2 and unbiased variance 1/16: alpha = beta = 3/2.
    grpo = group_normalized(REWARDS, GROUP, WEIGHT, ddof=0, eps=0.0)
    np.testing.assert_allclose(beta_normalized(REWARDS, GROUP, WEIGHT), np.pi / 8 * grpo, rtol=1e-5)


@pytest.mark.parametrize("rewards", [[1.0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0, 1, 0]])
def test_one_prompt_or_equal_success_rates_is_plain_centring(rewards):
    group = jnp.arange(len(rewards)) // 4
    rewards, weight = jnp.array(rewards), jnp.ones(len(rewards))
    centred = group_normalized(rewards, group, weight, scale="none")
    np.testing.assert_allclose(beta_normalized(rewards, group, weight), centred, rtol=1e-6)


def test_solved_and_hopeless_prompts_get_zero_and_shape_the_density():
    rewards = jnp.concatenate([REWARDS, jnp.ones(4), jnp.zeros(4)])
    group, weight = jnp.concatenate([GROUP, jnp.full(4, 5), jnp.full(4, 9)]), jnp.ones(20)
    advantages = beta_normalized(rewards, group, weight)
    np.testing.assert_array_equal(advantages[12:], 0)
    assert np.isfinite(advantages).all()
    assert abs(float(advantages[0])) > 0.4  # the density is flatter: alpha = beta nearer to 1


def test_the_scale_has_a_bound():
    rewards = jnp.concatenate([jnp.tile(jnp.array([1.0, 0]), 48), jnp.zeros(63), jnp.ones(1)])
    group, weight = jnp.concatenate([jnp.repeat(jnp.arange(48), 2), jnp.full(64, 48)]), jnp.ones(160)
    free = jnp.abs(beta_normalized(rewards, group, weight)).max()
    bounded = jnp.abs(beta_normalized(rewards, group, weight, largest_scale=2.0)).max()
    assert free > 2.0
    np.testing.assert_allclose(bounded, 2.0 * 63 / 64, rtol=1e-5)


def test_rewards_of_another_range_are_mapped_to_zero_and_one():
    mapped = beta_normalized(2 * REWARDS - 1, GROUP, WEIGHT, least_reward=-1.0)
    np.testing.assert_allclose(mapped, beta_normalized(REWARDS, GROUP, WEIGHT), rtol=1e-6)


def test_several_rewards_are_averaged():
    other = jnp.roll(REWARDS, 5)
    both = beta_normalized_components(jnp.stack([REWARDS, other], axis=1), GROUP, WEIGHT)
    alone = [beta_normalized(r, GROUP, WEIGHT) for r in (REWARDS, other)]
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2, rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"least_reward is 1.0 and largest_reward is 1.0"):
        beta_normalized(REWARDS, GROUP, WEIGHT, least_reward=1.0)
    with pytest.raises(ValueError, match=r"largest_scale is 0"):
        beta_normalized(REWARDS, GROUP, WEIGHT, largest_scale=0)
