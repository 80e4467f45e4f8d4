"""Credit for the best of k samples."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages
from jaxrl_llm.advantages import group_normalized

# Sorting and scanning compile slowly one operation at a time.
max_at_k_weights = jax.jit(advantages.max_at_k_weights, static_argnames=("k", "baseline"))
pass_at_k_normalized = jax.jit(advantages.pass_at_k_normalized, static_argnames="k")
top_margin = jax.jit(advantages.top_margin, static_argnames="scale")

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def one_group(n):
    return jnp.zeros(n, int), jnp.ones(n)


def solved(c, n):
    return (jnp.arange(n) < c).astype(jnp.float32)


@pytest.mark.parametrize("c, n, k, right, wrong", [(2, 8, 4, 0.522233, -0.174078), (1, 16, 2, 2.645751, -0.176383)])
def test_worked_example_of_set_advantages(c, n, k, right, wrong):
    advantages = pass_at_k_normalized(solved(c, n), *one_group(n), k=k)
    np.testing.assert_allclose(advantages, [right] * c + [wrong] * (n - c), **DIGITS)
    np.testing.assert_allclose(advantages.sum(), 0, atol=1e-5)


def test_worked_example_of_the_unbiased_weights():
    rewards = jnp.array([1.0, 0, 0, 1, 0, 0])
    plain = max_at_k_weights(rewards, *one_group(6), k=3, baseline=False)
    np.testing.assert_allclose(plain, [0.5, 0.35, 0.35, 0.5, 0.35, 0.35], **DIGITS)
    with_baseline = max_at_k_weights(rewards, *one_group(6), k=3)
    np.testing.assert_allclose(with_baseline, [0.3, 0, 0, 0.3, 0, 0], **DIGITS)


def test_worked_examples_of_the_top_margin():
    np.testing.assert_allclose(top_margin(jnp.array([0.2, 1, 0.5]), *one_group(3), scale="none"), [0, 0.5, 0], **DIGITS)
    np.testing.assert_allclose(top_margin(jnp.array([0.9, 0.2, 0.5, 0.1]), *one_group(4)), [1.11297, 0, 0, 0], **DIGITS)


def test_set_advantages_with_k_one_are_grpo_with_the_population_deviation():
    correct = jnp.array([1.0, 0, 0, 1, 1, 0, 1, 1])
    group = jnp.array([0, 0, 0, 0, 1, 1, 1, 1])
    grpo = group_normalized(correct, group, jnp.ones(8), ddof=0, eps=0.0)
    np.testing.assert_allclose(pass_at_k_normalized(correct, group, jnp.ones(8), k=1), grpo, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("baseline", [False, True])
def test_weights_equal_the_sum_over_all_subsets(k, baseline):
    rewards = np.array([0.5, -1.0, 2.0, 0.5, 1.5])
    expected = np.zeros(5)
    for subset in itertools.combinations(range(5), k):
        for i in subset:
            others = [rewards[j] for j in subset if j != i]
            expected[i] += rewards[list(subset)].max() - (max(others, default=0.0) if baseline else 0.0)
    weights = max_at_k_weights(jnp.asarray(rewards), *one_group(5), k=k, baseline=baseline)
    np.testing.assert_allclose(weights, expected / math.comb(5, k), rtol=1e-5, atol=1e-6)


def test_the_weights_give_the_gradient_of_the_expected_maximum_of_k():
    # Bernoulli policy: E[max of k] = 1 - (1 - p)^k, so its derivative by p is k (1 - p)^(k - 1).
    p, n, k = 0.3, 4, 2
    gradient = {True: 0.0, False: 0.0}
    for outcome in itertools.product((0.0, 1.0), repeat=n):
        rewards = np.array(outcome)
        chance = np.prod(np.where(rewards == 1, p, 1 - p))
        score = np.where(rewards == 1, 1 / p, -1 / (1 - p))
        for baseline in gradient:
            weights = np.asarray(max_at_k_weights(jnp.asarray(rewards), *one_group(n), k=k, baseline=baseline))
            gradient[baseline] += chance * (weights * score).sum()
    for value in gradient.values():
        np.testing.assert_allclose(value, k * (1 - p) ** (k - 1), rtol=1e-5)


def test_groups_that_always_or_never_succeed_teach_nothing():
    for c in (0, 8, 6):  # with 2 wrong samples every subset of 4 holds a right one
        np.testing.assert_array_equal(pass_at_k_normalized(solved(c, 8), *one_group(8), k=4), 0)


def test_a_group_smaller_than_k_uses_its_size():
    correct, group = jnp.array([1.0, 0, 1, 0, 0]), jnp.array([0, 0, 1, 1, 1])
    for method in (pass_at_k_normalized, max_at_k_weights):
        together = method(correct, group, jnp.ones(5), k=9)
        np.testing.assert_allclose(together[:2], method(correct[:2], *one_group(2), k=2), rtol=1e-6)
        np.testing.assert_allclose(together[2:], method(correct[2:], *one_group(3), k=3), rtol=1e-6)


def test_a_tie_for_the_best_has_no_margin():
    np.testing.assert_array_equal(top_margin(jnp.array([1.0, 0.0, 1.0]), *one_group(3)), 0)


def test_bad_hyper_parameters_are_named():
    for method in (pass_at_k_normalized, max_at_k_weights):
        with pytest.raises(ValueError, match="k is 0"):
            method(jnp.ones(2), *one_group(2), k=0)
    with pytest.raises(ValueError, match="scale is 'batch'"):
        top_margin(jnp.ones(2), *one_group(2), scale="batch")
