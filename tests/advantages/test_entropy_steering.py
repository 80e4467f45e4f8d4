"""Entropy held at a target."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import (
    entropy_mixed_advantages,
    steered_advantages,
    steered_batch,
    steering_temperature,
    temperature_controller,
)

# Extra answers first, then the batch.
ADVANTAGES = jnp.array([0.7, -0.7, 0.04, 1.2, 0.5, -0.5, 1, -1])[:, None]
EXTRA = jnp.arange(8) < 4
LOGPROBS = -jnp.arange(1.0, 9.0)[:, None]
MASK, WEIGHT = jnp.ones((8, 1)), jnp.ones(8)


def kept(entropy, weight=WEIGHT, **hyper):
    method = steered_batch(**hyper)
    memory = method.init() | {"entropy": jnp.float32(entropy)}
    return method.update(memory, ADVANTAGES, EXTRA, LOGPROBS, MASK, weight)


@pytest.mark.parametrize("entropy, rows", [(0.3, [0, 3, 6, 7]), (0.7, [0, 5, 6, 7])])
def test_worked_example(entropy, rows):
    weight, memory = kept(entropy)
    np.testing.assert_array_equal(np.flatnonzero(weight), rows)
    assert memory["entropy"] == np.mean(rows) + 1
    advantages = steered_advantages(ADVANTAGES, EXTRA, MASK, weight)
    np.testing.assert_array_equal(
        advantages[np.array(rows), 0],
        [1] * sum(r < 4 for r in rows) + [float(ADVANTAGES[r, 0]) for r in rows if r >= 4],
    )


def test_worked_example_of_temperatures():
    temperatures = [float(steering_temperature(h)) for h in (0.3, 0.7)]
    np.testing.assert_allclose(temperatures, [1.2, 0.8], rtol=1e-6)


def test_the_batch_keeps_its_size():
    for entropy in (0.3, 0.7):
        for cap in (0, 1, 60):
            assert kept(entropy, cap=cap)[0].sum() == 4
    weight, _ = kept(0.3, weight=WEIGHT.at[3].set(0.0))
    np.testing.assert_array_equal(np.flatnonzero(weight), [0, 5, 6, 7])


def test_the_controller_draws_hotter_below_the_target_and_colder_above():
    method = temperature_controller(target=0.5)
    memory = method.init()
    assert memory["entropy"] == 0
    for entropy, temperature in ((0.3, 1.2), (0.8, 0.8), (0.4, 1.2)):
        value, memory = method.update(memory, jnp.full((8, 1), -entropy), MASK, WEIGHT)
        assert value == pytest.approx(temperature)
        assert memory["entropy"] == pytest.approx(entropy)


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
    with pytest.raises(ValueError, match=r"cold is 1.2 and hot is 1.2"):
        temperature_controller(cold=1.2)
    with pytest.raises(ValueError, match=r"cap is -1"):
        steered_batch(cap=-1)
    with pytest.raises(ValueError, match=r"largest_gap is -0.1"):
        entropy_mixed_advantages(ADVANTAGES, WEIGHT, LOGPROBS, LOGPROBS, MASK, WEIGHT, largest_gap=-0.1)
