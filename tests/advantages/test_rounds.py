"""Reinforce-Ada's selection and Knapsack RL's budgets: the cards' numbers and what must hold around them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import (
    balanced_samples,
    finished_prompts,
    knapsack_rollouts,
    mixed_probability,
    pool_centred,
    rollout_value,
    rollouts_for_signal,
)

ARRIVED = jnp.array([[0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]], jnp.float32)


def test_reinforce_ada_card():
    rounds = [int(finished_prompts(ARRIVED[:, :n], jnp.ones((1, n), bool), kept=4)[0]) for n in (4, 8, 12)]
    assert rounds == [0, 0, 1]
    places, there = balanced_samples(ARRIVED, jnp.ones((1, 12), bool), kept=4)
    assert places.tolist() == [[2, 9, 0, 1]]
    assert there.all()
    advantages = pool_centred(ARRIVED[0, places[0]], jnp.full(4, 2 / 12), jnp.full(4, 12.0), jnp.ones(4))
    np.testing.assert_allclose(advantages, [0.833333, 0.833333, -0.166667, -0.166667], rtol=2e-6)


def test_what_one_kind_lacks_the_other_fills():
    label = jnp.array([[1.0] * 10 + [0.0]])
    places, _ = balanced_samples(label, jnp.ones((1, 11), bool), kept=8)
    assert label[0, places[0]].tolist() == [1] * 7 + [0]
    assert places.tolist() == [[*range(7), 10]]
    places, there = balanced_samples(label * 0, jnp.ones((1, 11), bool), kept=8)
    assert places.tolist() == [list(range(8))]
    assert there.all()


def test_samples_that_were_not_drawn_are_not_kept():
    label, drawn = jnp.array([[1.0, 1, 0, 0, 1]]), jnp.array([[True, False, True, False, False]])
    places, there = balanced_samples(label, drawn, kept=4)
    assert there.tolist() == [[True, True, False, False]]
    assert places[0, :2].tolist() == [0, 2]
    assert not finished_prompts(label, drawn, kept=4)[0]
    assert finished_prompts(label, drawn, kept=4, both_kinds=False)[0]


def test_scaled_by_the_deviation_of_the_pool():
    pool = np.array([1.0, 0, 0, 1, 0])
    ours = pool_centred(jnp.array([1.0, 0.0]), jnp.full(2, pool.mean()), jnp.full(2, 5.0), jnp.ones(2), scale=True)
    np.testing.assert_allclose(ours, (np.array([1, 0]) - pool.mean()) / (pool.std(ddof=1) + 1e-6), rtol=1e-5)


def test_pools_of_one_and_of_equal_samples_are_finite():
    label, ones = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.ones(4)
    mean, count = jnp.array([1.0, 0.0, 1.0, 0.5]), jnp.array([1.0, 1.0, 6.0, 6.0])
    np.testing.assert_allclose(pool_centred(label, mean, count, ones), [1, 0, 0, 0.5])
    scaled = pool_centred(label, mean, count, ones.at[3].set(0.0), scale=True)
    np.testing.assert_allclose(scaled, [1, 0, 0, 0], atol=1e-5)
    with pytest.raises(ValueError, match="eps is -1"):
        pool_centred(label, mean, count, ones, eps=-1)


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
