"""Length rewards: GRPO-lambda's switch, and the plain truncation of DLER."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import group_normalized, reinforce_plus_plus_baseline, solved_group_length_penalty
from jaxrl_llm.rewards import truncation_zero
from jaxrl_llm.selection import nonconstant_groups

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
CORRECT = jnp.array([1.0, 1, 0, 1, 0, 1, 0, 0])
LENGTH = jnp.array([10, 20, 30, 40, 5, 6, 7, 8])
GROUP, WEIGHT = jnp.repeat(jnp.arange(2), 4), jnp.ones(8)


def test_worked_example():
    rewards = solved_group_length_penalty(CORRECT, LENGTH, GROUP, WEIGHT)
    np.testing.assert_allclose(rewards, [0.948883, 0.913284, 0, 0.841624, 0, 1, 0, 0], **DIGITS)
    expected = [0.602726, 0.524112, -1.4927, 0.365864, -0.499999, 1.5, -0.499999, -0.499999]
    # A difference of near rewards over a small deviation costs float32 a digit.
    np.testing.assert_allclose(group_normalized(rewards, GROUP, WEIGHT), expected, rtol=1e-5, atol=2e-6)


def test_the_threshold_penalises_by_rate_alone():
    both = solved_group_length_penalty(CORRECT, LENGTH, GROUP, WEIGHT, threshold=0.25)
    assert 0 < both[5] < 1
    one = solved_group_length_penalty(CORRECT, LENGTH, GROUP, WEIGHT, threshold=0.5)
    np.testing.assert_allclose(one, solved_group_length_penalty(CORRECT, LENGTH, GROUP, WEIGHT), rtol=1e-6)


def test_of_equally_solved_groups_the_lower_id_is_penalised_wherever_its_rows_stand():
    correct, length = jnp.ones(4), jnp.array([1, 9, 1, 9])
    for group in (jnp.array([3, 3, 1, 1]), jnp.array([1, 1, 3, 3])):
        rewards = np.asarray(solved_group_length_penalty(correct, length, group, jnp.ones(4)))
        np.testing.assert_array_equal(rewards[np.asarray(group) == 3], 1)
        assert (rewards[np.asarray(group) == 1] < 1).all()


def test_a_single_correct_answer_pays_half_and_no_correct_answer_pays_nothing():
    rewards = solved_group_length_penalty(
        jnp.array([1.0, 0, 0, 0]), LENGTH[:4], jnp.array([0, 0, 1, 1]), WEIGHT[:4], share=1.0
    )
    np.testing.assert_allclose(rewards, [0.9, 0, 0, 0], rtol=1e-6)


def test_share_zero_is_the_reward_itself():
    np.testing.assert_array_equal(solved_group_length_penalty(CORRECT, LENGTH, GROUP, WEIGHT, share=0.0), CORRECT)


@pytest.mark.parametrize(("name", "value"), [("share", 1.5), ("alpha", -0.1), ("threshold", 2.0)])
def test_bad_hyper_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        solved_group_length_penalty(CORRECT, LENGTH, GROUP, WEIGHT, **{name: value})


def test_worked_example_of_dler():
    correct, length = jnp.array([1.0, 1, 1, 0]), jnp.array([3, 2, 3, 1])
    group, weight = jnp.array([0, 0, 1, 1]), jnp.ones(4)
    mask = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    rewards = truncation_zero(correct, length >= 3)
    np.testing.assert_array_equal(rewards, [0, 1, 0, 0])
    kept = nonconstant_groups(rewards, group, weight)
    np.testing.assert_array_equal(kept, [1, 1, 0, 0])
    advantages = reinforce_plus_plus_baseline(rewards, group, mask, kept)
    np.testing.assert_allclose(advantages, [[-0.730297] * 3, [1.09545, 1.09545, 0], [0] * 3, [0] * 3], **DIGITS)
