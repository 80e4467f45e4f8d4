"""Knapsack RL: the card's numbers and what must hold around them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.selection import knapsack_rollouts, mixed_probability, rollout_value, rollouts_for_signal


def test_knapsack_card():
    np.testing.assert_allclose(rollout_value(8.0, jnp.float32(0.1)), 0.046132, rtol=2e-5)
    np.testing.assert_allclose(rollout_value(2.0, jnp.float32(0.5)), 0.0625, rtol=2e-6)
    np.testing.assert_allclose(mixed_probability(8.0, jnp.float32(0.1)), 0.569533, rtol=2e-6)
    np.testing.assert_allclose(rollouts_for_signal(jnp.float32(0.1)), 21.854345, rtol=2e-6)
    np.testing.assert_allclose(rollouts_for_signal(jnp.float32(0.35), rule="expectation"), 3.395604, rtol=2e-6)
    p = jnp.array([0.1, 0.5, 0.9, 0.0, 1.0, 0.3])
    assert knapsack_rollouts(p, p >= 0, samples_per_prompt=8, most=32).tolist() == [22, 8, 2, 2, 2, 12]
    p = jnp.array([0.05, 0.2, 0.45, 0.7])
    assert knapsack_rollouts(p, p >= 0, samples_per_prompt=6, most=16).tolist() == [2, 10, 6, 6]


def test_the_greedy_choice_is_the_best_of_all():
    p, mean, most = np.array([0.15, 0.4, 0.8], np.float32), 4, 9
    ours = knapsack_rollouts(jnp.asarray(p), jnp.ones(3, bool), samples_per_prompt=mean, most=most)
    value = lambda counts: sum(float(rollout_value(float(n), jnp.float32(q))) for n, q in zip(counts, p, strict=True))  # noqa: E731
    choices = [c for c in itertools.product(range(2, most + 1), repeat=3) if sum(c) == 3 * mean]
    assert value(ours.tolist()) == pytest.approx(max(map(value, choices)), rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_budget_is_spent_to_the_last_rollout(seed):
    rng = np.random.default_rng(seed)
    p = rng.choice([0.0, 1.0, 0.5, 0.01, 0.99, *rng.random(3)], 12).astype(np.float32)
    seen = rng.random(12) < 0.7
    counts = knapsack_rollouts(jnp.asarray(p), jnp.asarray(seen), samples_per_prompt=5, most=9)
    assert int(counts.sum()) == 60
    assert (np.asarray(counts) >= np.where(seen, 2, 5)).all()


@pytest.mark.parametrize(
    "p, expected",
    [
        ([0.0, 0.0, 1.0], [5, 5, 2]),  # nobody is mixed: those that were never right share what is left
        ([1.0, 1.0, 1.0], [4, 4, 4]),  # nor is one of those there: all alike
        ([0.5, 0.0, 1.0], [5, 5, 2]),  # a mixed prompt takes what it can use, a failed one the rest
    ],
)
def test_where_there_is_little_to_choose(p, expected):
    counts = knapsack_rollouts(jnp.array(p), jnp.ones(3, bool), samples_per_prompt=4)
    assert counts.tolist() == expected
    assert knapsack_rollouts(jnp.array(p), jnp.zeros(3, bool), samples_per_prompt=4).tolist() == [4, 4, 4]


def test_bad_budgets():
    with pytest.raises(ValueError, match="least is 5, samples_per_prompt 4"):
        knapsack_rollouts(jnp.zeros(2), jnp.ones(2, bool), samples_per_prompt=4, least=5)
    with pytest.raises(ValueError, match="alpha is 1"):
        rollouts_for_signal(jnp.zeros(2), alpha=1)
    with pytest.raises(ValueError, match="rule is 'median'"):
        rollouts_for_signal(jnp.zeros(2), rule="median")
