"""Token-level credit."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import (
    discounted_returns,
    gae,
    gae_returns,
    generalized_advantages,
    kl_penalized_rewards,
    outcome_token_rewards,
    reinforce_plus_plus,
    whitened,
)

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0]])
TOKEN_REWARDS = jnp.array([[0.0, 0, 1], [0, -1, 0]])
VALUES = jnp.array([[0.2, 0.4, 0.6], [0.1, 0.3, 0]])
REWARDS = jnp.array([1.0, -1.0])
WEIGHT = jnp.ones(2)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example_of_ppo():
    advantages, returns = generalized_advantages(TOKEN_REWARDS, VALUES, MASK, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantages, [[0.46816, 0.428, 0.4], [-0.766, -1.3, 0]], **DIGITS)
    np.testing.assert_allclose(returns, [[0.66816, 0.828, 1], [-0.666, -1, 0]], **DIGITS)
    white = [[0.75436, 0.705664, 0.671713], [-0.742118, -1.38962, 0]]
    np.testing.assert_allclose(whitened(advantages, MASK, WEIGHT), white, **DIGITS)


def test_the_credit_functions_place_the_outcome_on_the_last_token():
    np.testing.assert_array_equal(outcome_token_rewards(REWARDS, MASK), TOKEN_REWARDS)
    advantages, returns = generalized_advantages(TOKEN_REWARDS, VALUES, MASK, gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(gae(REWARDS, VALUES, MASK, WEIGHT, gamma=0.9, lam=0.8), advantages)
    np.testing.assert_array_equal(gae_returns(REWARDS, VALUES, MASK, WEIGHT, gamma=0.9, lam=0.8), returns)
    dense = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]])
    expected = generalized_advantages(dense, VALUES, MASK)[0]
    np.testing.assert_array_equal(gae(REWARDS, VALUES, MASK, WEIGHT, dense), expected)


def test_worked_example_of_the_value_model_card():
    mask = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    rewards = jnp.array([[0.0, 0, 1, 0], [0.1, -0.2, 0, 2]])
    values = jnp.array([[0.2, 0.4, 0.6, 0.9], [0.5, 0.5, 1, 1.5]])
    advantages, returns = generalized_advantages(rewards, values, mask, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.751, 0.58, 0.4, 0], [1.264937, 1.22625, 0.975, 0.5]], **DIGITS)
    np.testing.assert_allclose(returns, [[0.951, 0.98, 1, 0], [1.764937, 1.72625, 1.975, 2]], **DIGITS)


def test_worked_example_of_reinforce_plus_plus():
    expected = [[0.636574, 0.724987, 0.823224], [-1.04327, -1.14151, 0]]
    np.testing.assert_allclose(reinforce_plus_plus(REWARDS, MASK, WEIGHT, gamma=0.9), expected, **DIGITS)
    np.testing.assert_allclose(reinforce_plus_plus(REWARDS, MASK, WEIGHT, TOKEN_REWARDS, gamma=0.9), expected, **DIGITS)


def test_with_gamma_and_lambda_one_the_advantage_is_the_return_minus_the_value():
    advantages = gae(REWARDS, VALUES, MASK, WEIGHT, gamma=1.0, lam=1.0)
    returns = discounted_returns(REWARDS, MASK, WEIGHT)
    np.testing.assert_allclose(returns, [[1, 1, 1], [-1, -1, 0]])
    np.testing.assert_allclose(advantages, (returns - VALUES) * MASK, rtol=1e-6)


def test_with_lambda_zero_it_is_the_one_step_error():
    advantages = gae(REWARDS, VALUES, MASK, WEIGHT, gamma=0.9, lam=0.0)
    expected = [[0.9 * 0.4 - 0.2, 0.9 * 0.6 - 0.4, 1 - 0.6], [0.9 * 0.3 - 0.1, -1 - 0.3, 0]]
    np.testing.assert_allclose(advantages, expected, **DIGITS)


def test_observations_between_turns_are_stepped_over():
    dense_rewards = jnp.array([[0.5, 0.0, 1.0]])
    dense_values = jnp.array([[0.2, 0.4, 0.6]])
    spread_mask = jnp.array([[1.0, 0, 0, 1, 1, 0]])
    where = np.array([0, 3, 4])
    spread_rewards = jnp.full((1, 6), 7.0).at[:, where].set(dense_rewards)
    spread_values = jnp.full((1, 6), jnp.nan).at[:, where].set(dense_values)
    compact = generalized_advantages(dense_rewards, dense_values, jnp.ones((1, 3)), gamma=0.9, lam=0.8)
    spread = generalized_advantages(spread_rewards, spread_values, spread_mask, gamma=0.9, lam=0.8)
    for a, b in zip(compact, spread, strict=True):
        np.testing.assert_array_equal(b[:, where], a)
        np.testing.assert_array_equal(np.delete(np.asarray(b), where, axis=1), 0)


def test_it_equals_the_backward_loop_over_one_row_at_a_time():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 4, 7))
    mask = rng.integers(0, 2, (4, 7))
    expected = np.zeros((4, 7))
    for row in range(4):
        after_value = after = 0.0
        for t in reversed(range(7)):
            if mask[row, t]:
                after = rewards[row, t] + 0.97 * after_value - values[row, t] + 0.97 * 0.9 * after
                after_value = values[row, t]
                expected[row, t] = after
    arrays = [jnp.asarray(x, jnp.float32) for x in (rewards, values, mask)]
    np.testing.assert_allclose(generalized_advantages(*arrays, gamma=0.97, lam=0.9)[0], expected, rtol=1e-5, atol=1e-6)


def test_kl_is_charged_on_every_token_that_counts():
    old = jnp.array([[-1.0, -2.0, -0.5], [-0.1, -0.2, -0.3]])
    reference = old - jnp.array([[0.2, -0.4, 0.0], [1.0, 0.0, 5.0]])
    rewards = kl_penalized_rewards(REWARDS, old, reference, MASK, kl_coefficient=0.1)
    np.testing.assert_allclose(rewards, [[-0.02, 0.04, 1.0], [-0.1, -1.0, 0.0]], rtol=1e-5, atol=1e-7)
    each = kl_penalized_rewards(REWARDS, old, reference, MASK, None, jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(each, [[-0.02, 0.04, 1.0], [-0.2, -1.0, 0.0]], rtol=1e-5, atol=1e-7)
    dense = kl_penalized_rewards(REWARDS, old, reference, MASK, jnp.ones((2, 3)), kl_coefficient=0.1)
    np.testing.assert_allclose(dense, [[0.98, 1.04, 1.0], [0.9, 1.0, 0.0]], rtol=1e-5)


def test_a_row_without_tokens_gets_nothing():
    mask = jnp.array([[0.0, 0, 0], [1, 1, 0]])
    assert outcome_token_rewards(REWARDS, mask).sum() == -1.0
    np.testing.assert_array_equal(gae(REWARDS, VALUES, mask, WEIGHT)[0], 0)


@pytest.mark.parametrize("hyper, message", [({"gamma": 1.5}, "gamma is 1.5"), ({"lam": -0.1}, "lam is -0.1")])
def test_discounts_outside_zero_to_one_are_errors(hyper, message):
    with pytest.raises(ValueError, match=message):
        gae(REWARDS, VALUES, MASK, WEIGHT, **hyper)
