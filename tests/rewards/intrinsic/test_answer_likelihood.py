"""The likelihood of the reference answer as a reward, and what VeriFree makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import leave_one_out, raw_rewards
from jaxrl_llm.losses import weighted_answer_likelihood
from jaxrl_llm.rewards import answer_likelihood

LOGPROBS = jnp.array([[-0.1, -0.5], [-1.0, -2.0]])
DIGITS = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("probability", [0.548812, 0.367879]),
        ("mean_probability", [0.755684, 0.367879]),
        ("log_probability", [-0.6, -1.0]),
        ("mean_log_probability", [-0.3, -1.0]),
    ],
)
def test_worked_example_of_the_forms(form, expected):
    mask = jnp.array([[1.0, 1], [1, 0]])
    np.testing.assert_allclose(answer_likelihood(LOGPROBS, mask, form=form), expected, **DIGITS)


def test_worked_example_of_verifree():
    rewards = answer_likelihood(LOGPROBS, jnp.ones((2, 2)))
    np.testing.assert_allclose(rewards, [0.548812, 0.049787], **DIGITS)
    thoughts = leave_one_out(rewards, jnp.zeros(2, jnp.int32), jnp.ones(2))
    np.testing.assert_allclose(thoughts, [0.499025, -0.499025], **DIGITS)
    np.testing.assert_allclose(raw_rewards(rewards, jnp.ones(2)), [0.548812, 0.049787], **DIGITS)


def test_padding_does_not_count_whatever_it_holds():
    padded, mask = jnp.array([[-0.1, -0.5, jnp.inf], [-1.0, -2.0, jnp.nan]]), jnp.array([[1.0, 1, 0], [1, 1, 0]])
    for form in ("probability", "mean_probability", "log_probability", "mean_log_probability"):
        there = answer_likelihood(padded, mask, form=form)
        np.testing.assert_array_equal(there, answer_likelihood(LOGPROBS, jnp.ones((2, 2)), form=form))


def test_a_thought_that_was_cut_off_has_its_own_reward():
    mask = jnp.array([[1.0, 1], [0, 0]])
    np.testing.assert_allclose(answer_likelihood(LOGPROBS, mask), [0.548812, 0.0], **DIGITS)
    low = answer_likelihood(LOGPROBS, mask, form="log_probability", without_answer=-50.0)
    np.testing.assert_allclose(low, [-0.6, -50.0], **DIGITS)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form is 'prob'; it must be one of probability, mean_probability"):
        answer_likelihood(LOGPROBS, jnp.ones((2, 2)), form="prob")


def test_both_terms_together_are_the_gradient_of_the_expected_likelihood():
    # Three thoughts z, two answers a: the policy says p(z) and p(a | z), and the reference answer is 0.
    scores = {"thought": jnp.array([0.3, -0.2, 0.1]), "answer": jnp.array([[0.5, 0.0], [-1.0, 0.2], [0.1, 0.9]])}

    def expected(scores):
        return jnp.sum(jax.nn.softmax(scores["thought"]) * jax.nn.softmax(scores["answer"])[:, 0])

    def both(scores):
        frozen = jax.lax.stop_gradient
        thought, answer = jax.nn.log_softmax(scores["thought"]), jax.nn.log_softmax(scores["answer"])[:, :1]
        weight = frozen(jnp.exp(thought))  # each thought once, as often as it would be sampled
        reward = frozen(answer_likelihood(answer, jnp.ones((3, 1))))
        loss = weighted_answer_likelihood(answer, jnp.ones((3, 1)), reward, weight)
        return loss.value - jnp.sum(weight * reward * thought)

    for name, exact in jax.grad(expected)(scores).items():
        np.testing.assert_allclose(-jax.grad(both)(scores)[name], exact, rtol=1e-5, atol=1e-7)


def test_a_split_of_the_rows_gives_the_same_loss_and_absent_rows_none():
    rng = np.random.default_rng(0)
    logprobs = jnp.asarray(rng.uniform(-2, 0, (4, 3)), jnp.float32)
    mask, factor = jnp.array([[1.0, 1, 0]] * 3 + [[0.0] * 3]), jnp.array([0.5, 1.0, 0.2, 3.0])
    weight = jnp.array([1.0, 0.0, 1.0, 1.0])
    whole = weighted_answer_likelihood(logprobs, mask, factor, weight)
    parts = [
        weighted_answer_likelihood(logprobs[part], mask[part], factor[part], weight[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(whole.numerator, sum(part.numerator for part in parts), rtol=1e-6)
    assert float(whole.denominator) == sum(float(part.denominator) for part in parts) == 2
    by_hand = -(0.5 * logprobs[0, :2].sum() + 0.2 * logprobs[2, :2].sum()) / 2
    np.testing.assert_allclose(whole.value, by_hand, rtol=1e-6)
