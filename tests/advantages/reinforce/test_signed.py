"""Learning from right answers only, from wrong ones only, or unequally."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import signed_correctness
from jaxrl_llm.losses import policy_gradient
from jaxrl_llm.selection import nonzero_advantages

CORRECT = jnp.array([1.0, 0, 0, 1])
WEIGHT = jnp.ones(4)


def test_worked_example():
    np.testing.assert_allclose(signed_correctness(CORRECT, WEIGHT), [0.1, -1, -1, 0.1])
    np.testing.assert_array_equal(signed_correctness(CORRECT, WEIGHT, positive=1.0, negative=0.0), [1, 0, 0, 1])
    np.testing.assert_array_equal(signed_correctness(CORRECT, WEIGHT, positive=0.0), [0, -1, -1, 0])


def test_silent_rows_leave_the_averages():
    mask = jnp.array([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    rows = signed_correctness(CORRECT, WEIGHT, positive=1.0, negative=0.0)
    advantages = jnp.where(mask > 0, rows[:, None], 0.0)
    weight = nonzero_advantages(advantages, mask, jnp.array([1.0, 1, 1, 0.5]))
    np.testing.assert_array_equal(weight, [1, 0, 0, 0.5])
    loss = policy_gradient(jnp.zeros((4, 3)), advantages, mask * weight[:, None])
    assert loss.denominator == 2 + 0.5 * 3


def test_pushing_a_wrong_answer_down_hands_its_mass_on_in_proportion():
    # A descent step on -1 * log pi(y) moves the other logits by their probabilities.
    scores = jnp.array([1.0, 0.3, -0.5, 0.0])
    wrong = signed_correctness(jnp.zeros(1), jnp.ones(1), positive=0.0)
    loss = lambda z: policy_gradient(jax.nn.log_softmax(z)[None, :1], wrong[:, None], jnp.ones((1, 1))).value  # noqa: E731
    step = -jax.grad(loss)(scores)
    probabilities = jax.nn.softmax(scores)
    np.testing.assert_allclose(step[1:] / step[1:].sum(), probabilities[1:] / probabilities[1:].sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_the_sign_is_given(name):
    with pytest.raises(ValueError, match=f"{name} is -1.0"):
        signed_correctness(CORRECT, WEIGHT, **{name: -1.0})
