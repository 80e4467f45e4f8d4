"""The five ways from token losses to one number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import aggregate, row_weight

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_const", "dr_grpo")
MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("token_mean", -0.781111),
        ("seq_mean_token_sum", -1.7575),
        ("seq_mean_token_mean", -0.765833),
        ("token_sum_const", -2.34333),
        ("dr_grpo", -0.585833),
    ],
)
def test_worked_example(mode, expected):
    loss = aggregate(LOGPROBS, MASK, aggregation=mode, max_completion_tokens=3)
    np.testing.assert_allclose(loss.value, expected, rtol=5.5e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_weight_two_counts_as_two_rows(mode):
    twice = jnp.concatenate([LOGPROBS, LOGPROBS[1:2]]), jnp.concatenate([MASK, MASK[1:2]])
    weighted = MASK * jnp.array([1.0, 2, 1, 1])[:, None]
    a = aggregate(*twice, aggregation=mode, max_completion_tokens=3)
    b = aggregate(LOGPROBS, weighted, aggregation=mode, max_completion_tokens=3)
    np.testing.assert_allclose(a.numerator, b.numerator, rtol=1e-6)
    np.testing.assert_allclose(a.value, b.value, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_weight_zero_is_absent(mode):
    without = aggregate(LOGPROBS[:2], MASK[:2], aggregation=mode, max_completion_tokens=3)
    absent = aggregate(LOGPROBS, MASK * jnp.array([1.0, 1, 0, 0])[:, None], aggregation=mode, max_completion_tokens=3)
    np.testing.assert_allclose(without.value, absent.value, rtol=1e-6)
    np.testing.assert_array_equal(row_weight(MASK * jnp.array([1.0, 0.5, 0, 0])[:, None]), [1, 0.5, 0, 0])


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_has_value_and_gradient_zero(mode):
    value, gradient = jax.value_and_grad(lambda x: aggregate(x, MASK * 0, aggregation=mode).value)(LOGPROBS)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("mode", ["token_sum_const", "dr_grpo"])
def test_the_constant_defaults_to_the_width_of_the_batch(mode):
    fixed = aggregate(LOGPROBS, MASK, aggregation=mode, max_completion_tokens=3)
    np.testing.assert_allclose(aggregate(LOGPROBS, MASK, aggregation=mode).value, fixed.value)
    longer = aggregate(LOGPROBS, MASK, aggregation=mode, max_completion_tokens=6)
    np.testing.assert_allclose(longer.value, fixed.value / 2, rtol=1e-6)


def test_statistics_are_float32_whatever_comes_in():
    loss = aggregate(LOGPROBS.astype(jnp.bfloat16), MASK.astype(jnp.bfloat16))
    assert loss.numerator.dtype == loss.denominator.dtype == jnp.float32


def test_an_unknown_mode_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"aggregation is 'mean'.*token_mean, seq_mean_token_mean"):
        aggregate(LOGPROBS, MASK, aggregation="mean")
