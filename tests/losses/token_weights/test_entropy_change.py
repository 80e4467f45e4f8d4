"""STEER: weights of tokens from the entropy change that their update predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import entropy_change_weights, predicted_entropy_change
from jaxrl_llm.losses.token_weights.entropy_change import weights_of_change

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1, 0.5, -0.5])[:, None], MASK.shape)
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
ENTROPY, WEIGHT = jnp.ones_like(OLD), jnp.ones(4)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example():
    change = predicted_entropy_change(LOGPROBS, OLD, ENTROPY, ADVANTAGES, MASK)
    expected = [
        [0.0801047, 0.0996536, 0.174405],
        [0.0397788, 0.66571, 0],
        [0.422942, 0.0328742, 0.0399153],
        [0.0607788, 0, 0],
    ]
    np.testing.assert_allclose(change, jnp.array(expected), **DIGITS)
    linear = [[1.17015, 1.15779, 1.11054], [1.19564, 0.8, 0], [0.953448, 1.2, 1.19555], [1.18236, 0, 0]]
    np.testing.assert_allclose(weights_of_change(change, MASK > 0), jnp.array(linear), **DIGITS)
    exponential = [
        [0.973506, 0.967148, 0.943216],
        [0.986755, 0.8, 0],
        [0.867822, 0.989041, 0.98671],
        [0.979833, 0, 0],
    ]
    weights = weights_of_change(change, MASK > 0, form="exponential")
    np.testing.assert_allclose(weights, jnp.array(exponential), **DIGITS)


def test_the_prediction_is_the_slope_of_the_entropy_times_the_push_on_the_logit():
    logits = jnp.array([1.0, 0.2, -0.5, -2.0])
    entropy_of = lambda z: -(jax.nn.softmax(z) * jax.nn.log_softmax(z)).sum()  # noqa: E731
    log_p = jax.nn.log_softmax(logits)
    for symbol in range(4):
        slope = jax.grad(entropy_of)(logits)[symbol]
        one = lambda x: jnp.full((1, 1), x)  # noqa: E731
        change = predicted_entropy_change(
            one(log_p[symbol]), one(log_p[symbol]), one(entropy_of(logits)), one(1.0), one(1.0)
        )
        # d H / d z_a = -p_a (log p_a + H); a policy gradient pushes z_a by 1 - p_a, here per unit of probability.
        p = jnp.exp(log_p[symbol])
        np.testing.assert_allclose(change[0, 0], jnp.abs(slope) * (1 - p) / p, rtol=1e-5)


def test_the_credit_function_reads_the_policy_that_the_update_starts_from():
    weights = entropy_change_weights(OLD, ENTROPY, ADVANTAGES, MASK, WEIGHT)
    change = predicted_entropy_change(OLD, OLD, ENTROPY, ADVANTAGES, MASK)
    np.testing.assert_array_equal(weights, weights_of_change(change, MASK > 0))
    given = entropy_change_weights(OLD, ENTROPY, ADVANTAGES, MASK, WEIGHT, 2.0 * MASK)
    np.testing.assert_allclose(given, 2.0 * weights, rtol=1e-6)


def test_weights_stay_in_their_range_and_reach_its_ends():
    weights = np.asarray(entropy_change_weights(OLD, ENTROPY, ADVANTAGES, MASK, WEIGHT))[np.asarray(MASK) > 0]
    np.testing.assert_allclose([weights.min(), weights.max()], [0.8, 1.2], rtol=1e-6)


def test_equal_changes_get_the_midpoint():
    same = entropy_change_weights(jnp.full_like(OLD, -1.0), ENTROPY, ADVANTAGES * 0, MASK, WEIGHT, low=0.5)
    np.testing.assert_allclose(same, 0.85 * MASK, rtol=1e-6)


@pytest.mark.parametrize("form", ["linear", "exponential"])
def test_extreme_tokens_have_finite_weights(form):
    old = jnp.array([[-jnp.inf, -80.0, 0.0], [-1.0, jnp.nan, -1e-9]])
    advantages = jnp.array([[1.0, -1.0, 1e30], [jnp.inf, 1.0, 1.0]])
    ones = jnp.ones((2, 3))
    weights = np.asarray(entropy_change_weights(old, ones, advantages, ones, jnp.ones(2), form=form))
    assert np.isfinite(weights).all()
    assert (weights >= 0.8 - 1e-6).all()


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match=r"form is 'square'.*linear, exponential"):
        entropy_change_weights(OLD, ENTROPY, ADVANTAGES, MASK, WEIGHT, form="square")
    for low, high in ((1.1, 1.2), (0.8, 0.9)):
        with pytest.raises(ValueError, match=f"low is {low} and high is {high}"):
            entropy_change_weights(OLD, ENTROPY, ADVANTAGES, MASK, WEIGHT, low=low, high=high)
