"""MAPO: the advantage of a turn."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import group_normalized, taken_turns, turn_leave_one_out, turn_mixed_normalized

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
TURN_REWARDS = jnp.array([[1.0, 0, 2], [0, 1, 0], [2, 1, 0]])
TURN = jnp.tile(jnp.arange(3), (3, 1))
MASK = jnp.array([[1.0, 1, 1], [1, 1, 1], [1, 1, 0]])
GROUP, WEIGHT = jnp.zeros(3, jnp.int32), jnp.ones(3)


def test_worked_example():
    advantages = turn_mixed_normalized(TURN_REWARDS, TURN, MASK, GROUP, WEIGHT, gamma=0.9)
    expected = [[0.351486, 0.146658, 1.22058], [-1.26162, -0.273489, -1.06045], [1.15033, -0.273489, 0]]
    np.testing.assert_allclose(advantages, expected, **DIGITS)


def test_all_tokens_of_a_turn_share_its_advantage_and_observations_have_none():
    turn = jnp.array([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 2, 2], [0, 0, 1, -1, -1, 7]])
    mask = jnp.array([[1.0, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]])
    per_turn = np.asarray(turn_mixed_normalized(TURN_REWARDS, TURN, MASK, GROUP, WEIGHT, gamma=0.9))
    per_token = np.asarray(turn_mixed_normalized(TURN_REWARDS, turn, mask, GROUP, WEIGHT, gamma=0.9))
    a, b, c = per_turn
    expected = [[a[0], a[0], 0, a[1], a[1], a[2]], [b[0], 0, b[1], b[1], b[2], 0], [c[0], c[0], c[1], 0, 0, 0]]
    np.testing.assert_allclose(per_token, expected, rtol=1e-6)
    np.testing.assert_array_equal(taken_turns(turn, mask, 3), MASK > 0)


def test_one_turn_and_alpha_one_is_grpo_with_the_populations_deviation():
    rewards = jnp.array([1.0, 0, 0, 1, 0.3])
    group = jnp.array([0, 0, 0, 1, 1])
    nothing = jnp.zeros((5, 1), jnp.int32)
    turns = turn_mixed_normalized(rewards[:, None], nothing, jnp.ones((5, 1)), group, jnp.ones(5), alpha=1.0)
    expected = group_normalized(rewards, group, jnp.ones(5), ddof=0, eps=1e-8)
    np.testing.assert_allclose(turns[:, 0], expected, rtol=1e-6)


def test_a_turn_reached_by_one_sample_has_no_comparison_of_returns():
    alone = MASK.at[1, 2].set(0)
    advantages = turn_mixed_normalized(TURN_REWARDS, TURN, alone, GROUP, WEIGHT, alpha=1.0)
    np.testing.assert_array_equal(advantages[:, 2], 0)


def test_the_scope_of_a_turns_own_reward_is_the_group_or_the_batch():
    rewards = jnp.concatenate([TURN_REWARDS, TURN_REWARDS + 10.0])
    turn, mask, group = jnp.tile(TURN, (2, 1)), jnp.tile(MASK, (2, 1)), jnp.repeat(jnp.arange(2), 3)
    in_group = turn_mixed_normalized(rewards, turn, mask, group, jnp.ones(6), alpha=0.0)
    np.testing.assert_allclose(in_group[:3], in_group[3:], atol=1e-5)
    in_batch = turn_mixed_normalized(rewards, turn, mask, group, jnp.ones(6), alpha=0.0, scope="batch")
    assert in_batch[:3].max() <= 0 <= in_batch[3:].min()


def test_equal_rewards_at_every_turn_give_zero():
    equal = turn_mixed_normalized(jnp.full((3, 3), 0.7), TURN, jnp.ones((3, 3)), GROUP, WEIGHT)
    np.testing.assert_array_equal(equal, 0)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"alpha": 1.5}, r"alpha is 1\.5"),
        ({"gamma": -0.1}, r"gamma is -0\.1"),
        ({"scope": "turn"}, "scope is 'turn'.*group, batch"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        turn_mixed_normalized(TURN_REWARDS, TURN, MASK, GROUP, WEIGHT, **hyper)


# ---- leave one out, turn by turn ------------------------------------------------------------------------------------


def test_each_turn_is_compared_with_the_same_turn_of_the_others():
    rewards = jnp.stack([jnp.array([1.0, 0, 0, 1]), jnp.array([0.0, 3, 0, 0])], axis=1)
    turn, mask = jnp.tile(jnp.array([0, 0, 0, 1]), (4, 1)), jnp.tile(jnp.array([1.0, 1, 0, 1]), (4, 1))
    advantages = turn_leave_one_out(rewards, turn, mask, jnp.zeros(4, jnp.int32), jnp.ones(4))
    np.testing.assert_allclose(advantages[:, 0], [0.666667, -0.666667, -0.666667, 0.666667], rtol=2e-6)
    np.testing.assert_allclose(advantages[:, 1], advantages[:, 0])
    np.testing.assert_array_equal(advantages[:, 2], 0)
    np.testing.assert_allclose(advantages[:, 3], [-1, 3, -1, -1], rtol=2e-6)


def test_only_samples_that_took_the_turn_are_compared():
    rewards = jnp.array([[1.0, 5], [0, 1], [0.5, jnp.nan], [1, 2]])
    turn, mask = jnp.tile(jnp.array([0, 1]), (4, 1)), jnp.array([[1.0, 1], [1, 1], [1, 0], [1, 1]])
    group, weight = jnp.array([3, 3, 3, 0]), jnp.array([1.0, 1, 1, 1])
    advantages = turn_leave_one_out(rewards, turn, mask, group, weight)
    np.testing.assert_allclose(advantages, [[0.75, 4], [-0.75, -4], [0, 0], [0, 0]], atol=1e-6)
    absent = turn_leave_one_out(rewards, turn, mask, group, weight.at[1].set(0))
    np.testing.assert_allclose(absent, [[0.5, 0], [0, 0], [-0.5, 0], [0, 0]], atol=1e-6)
