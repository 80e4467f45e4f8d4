"""REINFORCE without a baseline, with a running mean, and ReMax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import raw_rewards, reward_minus_baseline, running_mean_baseline
from jaxrl_llm.signatures import signature


def test_without_a_baseline_the_advantage_is_the_reward():
    np.testing.assert_array_equal(raw_rewards(jnp.array([2.0, -1.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])), [2, -1, 0])


def test_remax_subtracts_the_reward_of_the_greedy_answer():
    advantages = reward_minus_baseline(jnp.array([1.0, 0.0]), jnp.array([0.25, 1.0]), jnp.ones(2))
    np.testing.assert_array_equal(advantages, [0.75, -1.0])


def test_the_running_mean_is_the_debiased_average_of_earlier_batches():
    method = running_mean_baseline(decay=0.5)
    memory = method.init()
    batches = [jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0]), jnp.array([5.0, 5.0])]
    baselines = []
    update = jax.jit(method.update)
    for rewards in batches:
        advantages, memory = update(memory, rewards, jnp.ones(2))
        baselines.append(float((rewards - advantages)[0]))
    # The first batch uses its own mean 2, the second that of the first; the third weighs 2 and 0 as 1 to 2.
    np.testing.assert_allclose(baselines, [2.0, 2.0, 2 / 3], rtol=1e-6)


def test_constant_rewards_have_advantage_zero_from_the_first_batch_on():
    method = running_mean_baseline(decay=0.9)
    memory = method.init()
    update = jax.jit(method.update)
    for _ in range(3):
        advantages, memory = update(memory, jnp.full(4, 0.7), jnp.ones(4))
        np.testing.assert_allclose(advantages, 0, atol=1e-6)


def test_an_empty_batch_changes_nothing():
    method = running_mean_baseline()
    _, memory = method.update(method.init(), jnp.array([1.0, 3.0]), jnp.ones(2))
    advantages, after = method.update(memory, jnp.array([9.0, jnp.nan]), jnp.zeros(2))
    np.testing.assert_array_equal(advantages, 0)
    for name in memory:
        np.testing.assert_array_equal(after[name], memory[name])


def test_it_is_a_method_that_asks_for_rewards_and_weight_and_compiles():
    method = running_mean_baseline()
    assert signature(method).required == ("rewards", "weight")
    first = method.update(method.init(), jnp.array([1.0, 2.0]), jnp.ones(2))
    jitted = jax.jit(method.update)(method.init(), jnp.array([1.0, 2.0]), jnp.ones(2))
    np.testing.assert_allclose(jitted[0], first[0], rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_zero_to_one_is_an_error(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        running_mean_baseline(decay=decay)
