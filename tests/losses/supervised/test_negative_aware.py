"""Negative-aware fine-tuning: the worked example, its kinship with group-relative REINFORCE, and its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import negative_aware_likelihood, policy_gradient

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
CORRECT = jnp.array([1.0, 0, 1, 0])
GROUP = jnp.array([0, 0, 9, 9])
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def value_and_grad(logprobs=LOGPROBS, old=OLD, correct=CORRECT, group=GROUP, mask=MASK, **hyper):
    function = lambda x: negative_aware_likelihood(x, old, correct, group, mask, **hyper).value  # noqa: E731
    return jax.value_and_grad(function)(logprobs)


def test_worked_example():
    value, gradient = value_and_grad()
    np.testing.assert_allclose(value, -0.000367469, rtol=5.5e-6)
    expected = [[-0.0005, -0.0005, -0.0005], [0.000252061, 0.00183465, 0], [-0.0005] * 3, [0.000510101, 0, 0]]
    np.testing.assert_allclose(gradient, expected, rtol=5.5e-6, atol=1e-12)


def test_the_sequence_form_has_one_ratio_and_one_term_a_row():
    value, gradient = value_and_grad(level="sequence", max_completion_tokens=1)
    log_ratios = ((np.asarray(LOGPROBS) - np.asarray(OLD)) * np.asarray(MASK)).sum(1)
    ratios = np.exp(log_ratios)
    wrong = np.maximum(2 - ratios, 1.0)
    terms = np.where(CORRECT > 0, -log_ratios, -np.log(wrong))
    slopes = np.where(CORRECT > 0, -1.0, ratios / wrong)
    np.testing.assert_allclose(value, 0.5 * terms.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.5 * slopes[:, None] * MASK, rtol=1e-5)


@pytest.mark.parametrize("prompt_weight", ["failure_rate", "odds", "none"])
def test_on_fresh_samples_it_is_reinforce_with_a_group_baseline(prompt_weight):
    rng = np.random.default_rng(0)
    correct = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 0])
    group = jnp.repeat(jnp.array([30, 7]), 4)
    old, mask = jnp.asarray(rng.uniform(-2, -0.1, (8, 4)), jnp.float32), jnp.ones((8, 4))
    rate = jnp.repeat(jnp.array([0.25, 0.75]), 4)
    scale = {"failure_rate": 1.0, "odds": 1 / jnp.sqrt(rate * (1 - rate)), "none": 1 / (1 - rate)}[prompt_weight]
    signal = jnp.broadcast_to(((correct - rate) * scale)[:, None], old.shape)
    _, gradient = value_and_grad(old, old, correct, group, mask, prompt_weight=prompt_weight)
    expected = jax.grad(
        lambda x: policy_gradient(x, signal, mask, aggregation="token_sum_const", max_completion_tokens=1000).value
    )(old)
    np.testing.assert_allclose(gradient, expected, rtol=2e-6)


def test_groups_all_right_or_all_wrong_contribute_nothing():
    for correct in (jnp.ones(4), jnp.zeros(4)):
        value, gradient = value_and_grad(correct=correct)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
    _, gradient = value_and_grad(correct=jnp.array([1.0, 1, 1, 0]))
    assert np.abs(gradient[:2]).max() == 0
    assert np.abs(gradient[2:]).max() > 0


def test_absent_rows_do_not_count_in_the_success_rate():
    more = lambda x: jnp.concatenate([x, x[:2]])  # noqa: E731
    mask = jnp.concatenate([MASK, jnp.zeros((2, 3))])
    correct, group = jnp.concatenate([CORRECT, jnp.ones(2)]), jnp.concatenate([GROUP, jnp.array([0, 9])])
    value, gradient = value_and_grad(more(LOGPROBS), more(OLD), correct, group, mask)
    expected = value_and_grad()
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:4], expected[1], rtol=1e-6)


def test_a_wrong_token_at_the_floor_keeps_its_gradient():
    # R = 3.669 on token [1, 1]: the implied negative ratio is 2 - R < 0, below any floor.
    for floor in (0.5, 1.0, 2.0):
        _, gradient = value_and_grad(floor=floor)
        np.testing.assert_allclose(gradient[1, 1], 0.5 * np.exp(1.3) / floor / 1000, rtol=1e-5)
    loss = negative_aware_likelihood(LOGPROBS, OLD, CORRECT, GROUP, MASK)
    assert [float(x) for x in loss.metrics["floor_share"]] == [2, 9]


def test_the_weight_of_wrong_answers_is_a_factor():
    _, full = value_and_grad()
    _, half = value_and_grad(negative_weight=0.5)
    np.testing.assert_allclose(half, full * jnp.where(CORRECT > 0, 1.0, 0.5)[:, None], rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_impossible_tokens_leave_value_and_gradient_finite(level):
    for extreme in (-jnp.inf, -800.0, 800.0):
        value, gradient = value_and_grad(LOGPROBS.at[:, 0].set(extreme), level=level)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"level": "row"}, "level is 'row'"),
        ({"prompt_weight": "rate"}, "prompt_weight is 'rate'.*odds"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"negative_weight": -1.0}, "negative_weight is -1.0"),
        ({"least_rate": 0.5}, "least_rate is 0.5"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        value_and_grad(**hyper)
