"""Entropy held at a target."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import entropy_mixed_advantages

# Extra answers first, then the batch.
ADVANTAGES = jnp.array([0.7, -0.7, 0.04, 1.2, 0.5, -0.5, 1, -1])[:, None]
EXTRA = jnp.arange(8) < 4
LOGPROBS = -jnp.arange(1.0, 9.0)[:, None]
MASK, WEIGHT = jnp.ones((8, 1)), jnp.ones(8)


def test_the_variant_without_extra_samples():
    advantages = jnp.array([[1.0, 1.0], [-1.0, 0.0]])
    old = jnp.array([[-0.2, -0.4], [-0.6, 9.0]])  # entropy 0.4
    tempered = old + jnp.array([[0.5, -0.5], [0.3, 9.0]])
    mask, correct = jnp.array([[1.0, 1], [1, 0]]), jnp.array([1.0, 0])
    mixed = entropy_mixed_advantages(advantages, correct, old, tempered, mask, jnp.ones(2), target=0.45)
    a = (0.05 / 0.5) / (0.05 / 0.5 + 1)
    expected = [[1 - a + a * np.exp(0.5), 1 - a + a * np.exp(-0.5)], [-(1 - a), 0]]
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)
    far = entropy_mixed_advantages(advantages, correct, old, tempered, mask, jnp.ones(2), target=5.0)
    a = 0.2 / 1.2
    np.testing.assert_allclose(far[1, 0], -(1 - a), rtol=1e-5)


def test_the_variant_leaves_a_batch_without_right_answers_or_at_its_target_alone():
    arguments = (ADVANTAGES, jnp.zeros(8), LOGPROBS, LOGPROBS - 1, MASK, WEIGHT)
    np.testing.assert_array_equal(entropy_mixed_advantages(*arguments), ADVANTAGES)
    at_target = entropy_mixed_advantages(ADVANTAGES, WEIGHT, LOGPROBS, LOGPROBS - 1, MASK, WEIGHT, target=4.5)
    np.testing.assert_allclose(at_target, ADVANTAGES, rtol=1e-6)


def test_extreme_temperatures_are_finite():
    for shift in (-800.0, 800.0):
        mixed = entropy_mixed_advantages(ADVANTAGES, WEIGHT, LOGPROBS, LOGPROBS + shift, MASK, WEIGHT)
        assert np.isfinite(mixed).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"largest_gap is -0.1"):
        entropy_mixed_advantages(ADVANTAGES, WEIGHT, LOGPROBS, LOGPROBS, MASK, WEIGHT, largest_gap=-0.1)
