"""Cloning successes, pushing back failures, and how a token reward model weighs tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    failure_pushback,
    kl_estimate,
    outcome_token_weight,
    policy_gradient,
    success_cloning,
    token_reward_cross_entropy,
)

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5, -0.5])[:, None], MASK.shape)
CORRECT = jnp.array([1.0, 0, 1, 0])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
REFERENCE = jnp.array([[-1.1, -0.6, -0.4], [-0.6, -1.2, 0], [-1.7, -0.3, -1.0], [-0.9, 0, 0]])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def objective(logprobs, **hyper):
    cloning = success_cloning(logprobs, CORRECT, MASK, ADVANTAGES, **hyper)
    pushback = failure_pushback(logprobs, ADVANTAGES, CORRECT, MASK)
    return cloning.value + 0.5 * pushback.value + 0.01 * kl_estimate(logprobs, REFERENCE, MASK).value


def test_worked_example_of_oreal():
    value, gradient = jax.value_and_grad(objective)(LOGPROBS)
    np.testing.assert_allclose(value, 1.00053, **DIGITS)
    expected = [
        [-0.166465, -0.166913, -0.166512],
        [0.166278, 0.167326, 0],
        [-0.0835793, -0.0830876, -0.0835131],
        [0.083459, 0, 0],
    ]
    np.testing.assert_allclose(gradient, expected, **DIGITS)
    np.testing.assert_allclose(objective(LOGPROBS, scale_by_advantage=False), 1.25886, **DIGITS)


def test_worked_example_of_token_weights():
    logits, mask = jnp.array([[2.0, -1, -4]]), jnp.ones((1, 3))
    np.testing.assert_allclose(outcome_token_weight(logits, jnp.ones(1), mask), [[0.761594, 0.244919, 0]], **DIGITS)
    np.testing.assert_allclose(outcome_token_weight(logits, jnp.zeros(1), mask), [[0, 0, 0.462117]], **DIGITS)


def test_each_part_averages_over_its_own_rows():
    assert success_cloning(LOGPROBS, CORRECT, MASK, ADVANTAGES).denominator == 6
    assert failure_pushback(LOGPROBS, ADVANTAGES, CORRECT, MASK).denominator == 3
    _, cloning = jax.value_and_grad(lambda x: success_cloning(x, CORRECT, MASK, ADVANTAGES).value)(LOGPROBS)
    _, pushback = jax.value_and_grad(lambda x: failure_pushback(x, ADVANTAGES, CORRECT, MASK).value)(LOGPROBS)
    np.testing.assert_array_equal(cloning[jnp.array([1, 3])], 0)
    np.testing.assert_array_equal(pushback[jnp.array([0, 2])], 0)


def test_pushing_back_is_reinforce_in_gradient():
    wrong = MASK * (1 - CORRECT)[:, None]
    weight = jnp.full(MASK.shape, 0.3)
    expected = jax.grad(lambda x: policy_gradient(x, ADVANTAGES, wrong, weight).value)(LOGPROBS)
    gradient = jax.grad(lambda x: failure_pushback(x, ADVANTAGES, CORRECT, MASK, weight).value)(LOGPROBS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("correct", [jnp.ones(4), jnp.zeros(4)])
def test_a_batch_of_one_kind_has_no_other_part(correct):
    cloning = success_cloning(LOGPROBS, correct, MASK, ADVANTAGES)
    pushback = failure_pushback(LOGPROBS, ADVANTAGES, correct, MASK)
    empty = pushback if correct[0] else cloning
    assert empty.value == 0
    assert empty.denominator == 0


def test_the_token_reward_model_learns_the_outcome():
    logits = jnp.array([[3.0, -1, 4], [0.5, 1.5, 9], [0, 0, 0], [-2, 9, 9]])
    loss = token_reward_cross_entropy(logits, CORRECT, MASK)
    expected = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0)), np.log(2.0), np.log1p(np.exp(-2.0))]
    np.testing.assert_allclose(loss.value, np.mean(expected), rtol=1e-6)
    gradient = jax.grad(lambda z: token_reward_cross_entropy(z, CORRECT, MASK).value)(logits)
    np.testing.assert_array_equal(np.sign(gradient)[np.asarray(MASK) > 0], [-1, -1, -1, 1, 1, -1, -1, -1, 1])
    for extreme in (-800.0, 800.0):
        slope = jax.grad(lambda z: token_reward_cross_entropy(z, CORRECT, MASK).value)(jnp.full((4, 3), extreme))
        assert np.isfinite(slope).all()


def test_the_top_fraction_keeps_the_surest_tokens_of_a_row_rescaled():
    logits = jnp.array([[4.0, 0, -4, -4, 9], [1, 1, 1, 1, 9]])
    mask = jnp.array([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    right = outcome_token_weight(logits, jnp.ones(2), mask, top_fraction=0.75)
    opinion = jax.nn.sigmoid(jnp.array([4.0, 2.0, 0.0]))
    expected = (opinion - opinion[2]) / (opinion[0] - opinion[2])
    np.testing.assert_allclose(right[0], [*expected, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(right[1].sum(), 3)  # equal opinions count fully
    single = outcome_token_weight(logits, jnp.zeros(2), mask, top_fraction=0.25)
    np.testing.assert_array_equal(single[0], [0, 0, 0, 1, 0])


def test_tokens_outside_the_mask_and_empty_rows_have_no_weight():
    logits = jnp.array([[jnp.nan, 2.0, jnp.nan], [jnp.nan] * 3])
    mask = jnp.array([[0.0, 1, 0], [0, 0, 0]])
    for top_fraction in (None, 0.5):
        weights = outcome_token_weight(logits, jnp.ones(2), mask, top_fraction=top_fraction)
        expected = 1.0 if top_fraction else 2 * jax.nn.sigmoid(2.0) - 1
        np.testing.assert_allclose(weights, [[0, expected, 0], [0, 0, 0]], rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"scale_by_advantage is True, but there are no advantages"):
        success_cloning(LOGPROBS, CORRECT, MASK)
    with pytest.raises(ValueError, match=r"threshold is 1.0"):
        outcome_token_weight(LOGPROBS, CORRECT, MASK, threshold=1.0)
    with pytest.raises(ValueError, match=r"top_fraction is 0.0"):
        outcome_token_weight(LOGPROBS, CORRECT, MASK, top_fraction=0.0)
