"""Token budgets."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages
from jaxrl_llm.advantages import group_normalized, sample_budgets
from jaxrl_llm.advantages.group_relative import budgets

CORRECT = jnp.array([1.0, 1, 0, 1])
LENGTH = jnp.array([400, 700, 900, 2000])
BUDGET = jnp.array([512, 512, 1024, 1024])
GROUP, WEIGHT = jnp.zeros(4, jnp.int32), jnp.ones(4)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}

# The paper's limit.
budget_rewards, budget_advantages, budget_target = (
    partial(function, max_completion_tokens=4096)
    for function in (advantages.budget_rewards, advantages.budget_advantages, budgets.budget_target)
)


def test_worked_example():
    rewards = budget_rewards(CORRECT, LENGTH, BUDGET)
    np.testing.assert_allclose(rewards, [3.92314, 3.81084, 0, 2.64173], **DIGITS)
    advantages = budget_advantages(rewards, BUDGET, GROUP, WEIGHT)
    np.testing.assert_allclose(advantages, [0.672675, 0.611098, -3.79694, -2.34844], **DIGITS)
    bracket = advantages - group_normalized(rewards, GROUP, WEIGHT)
    np.testing.assert_allclose(bracket, [-0.0561517, -0.0561517, -2.37465, -2.37465], rtol=2e-5)


def test_the_release_adds_the_bracket_twice():
    rewards = budget_rewards(CORRECT, LENGTH, BUDGET)
    plain = group_normalized(rewards, GROUP, WEIGHT)
    once = budget_advantages(rewards, BUDGET, GROUP, WEIGHT) - plain
    twice = budget_advantages(rewards, BUDGET, GROUP, WEIGHT, budget_coefficient=2.0) - plain
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)


def test_the_reward_is_largest_at_the_budget_and_falls_beyond():
    length = jnp.array([100, 512, 513, 900, 2000, 4096, 4097])
    rewards = np.asarray(budget_rewards(jnp.ones(7), length, jnp.full(7, 512)))
    target = float(budget_target(jnp.array([512]))[0])
    assert rewards[1] == pytest.approx(target)
    assert (rewards <= target + 1e-6).all()
    assert (np.diff(rewards[1:5]) < 0).all()
    assert rewards[6] == 0


def test_a_subgroup_is_one_budget_of_one_prompt():
    rewards = jnp.array([4.0, 0, 2, 2, 1, 3])
    budget, group = jnp.array([512, 512, 1024, 512, 512, 1024]), jnp.array([0, 0, 0, 5, 5, 5])
    bracket = budget_advantages(rewards, budget, group, jnp.ones(6)) - group_normalized(rewards, group, jnp.ones(6))
    expected = np.array([2, 2, 2, 1.5, 1.5, 3]) - np.asarray(budget_target(budget))
    np.testing.assert_allclose(bracket, expected, rtol=1e-5)


def test_answers_without_a_final_answer_have_their_own_reward():
    rewards = budget_rewards(CORRECT, LENGTH, BUDGET, jnp.array([1.0, 1, 0, 1]))
    np.testing.assert_allclose(rewards[2], -1.0)
    np.testing.assert_array_equal(rewards[:2], budget_rewards(CORRECT, LENGTH, BUDGET)[:2])


def test_the_samples_of_a_prompt_share_the_budgets_equally():
    budgets = sample_budgets(jnp.tile(jnp.arange(16), 2), samples_per_prompt=16)
    assert sorted(np.unique(budgets, return_counts=True)[1]) == [8, 8, 8, 8]
    np.testing.assert_array_equal(budgets[:5], [512, 512, 512, 512, 1024])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"samples_per_prompt is 6"):
        sample_budgets(jnp.arange(6), samples_per_prompt=6)
    with pytest.raises(ValueError, match=r"max_completion_tokens is 0"):
        budget_rewards(CORRECT, LENGTH, BUDGET, max_completion_tokens=0)
