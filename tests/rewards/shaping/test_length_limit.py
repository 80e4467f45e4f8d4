"""Shaping by the length limit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import soft_overlong, truncation_zero


def test_soft_overlong_worked_example():
    lengths = jnp.asarray([10, 30, 40, 50])
    shaped = soft_overlong(jnp.zeros(4), lengths, max_completion_tokens=50, buffer_tokens=20)
    assert shaped.tolist() == [0.0, 0.0, -0.5, -1.0]


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_soft_overlong_adds_to_the_reward_and_scales_with_its_factor(factor):
    lengths, limits = jnp.asarray([10, 40, 50]), {"max_completion_tokens": 50, "buffer_tokens": 20}
    base = soft_overlong(jnp.zeros(3), lengths, **limits)
    shaped = soft_overlong(jnp.asarray([1.0, -1.0, 1.0]), lengths, factor=factor, **limits)
    np.testing.assert_allclose(shaped, jnp.asarray([1.0, -1.0, 1.0]) + factor * base)


def test_truncation_worked_example():
    correct, lengths = jnp.asarray([1.0, 1.0, 1.0, 0.0]), jnp.asarray([3, 2, 3, 1])
    assert truncation_zero(correct, lengths >= 3).tolist() == [0, 1, 0, 0]
    assert truncation_zero(jnp.asarray([-1.0, jnp.nan]), jnp.asarray([1.0, 1.0])).tolist() == [0, 0]


def test_statistics_are_float32_for_bfloat16_input():
    limits = {"max_completion_tokens": 50, "buffer_tokens": 20}
    assert soft_overlong(jnp.ones(2, jnp.bfloat16), jnp.asarray([1, 50]), **limits).dtype == jnp.float32


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"buffer_tokens": 0}, "buffer_tokens is 0"),
        ({"buffer_tokens": 6}, "buffer_tokens is 6"),
        ({"buffer_tokens": 5, "factor": -1}, "factor is -1"),
    ],
)
def test_bad_input_is_refused(hyper, message):
    with pytest.raises(ValueError, match=message):
        soft_overlong(jnp.ones(1), jnp.ones(1), max_completion_tokens=5, **hyper)
