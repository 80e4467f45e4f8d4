"""pass@k: the worked examples, the definition by enumeration, and what is refused."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from jaxrl_llm.evaluation import mean_pass_at_k, pass_at_k


@pytest.mark.parametrize(("n", "c", "k", "expected"), [(16, 3, 4, 0.607143), (10, 0, 5, 0.0), (8, 6, 4, 1.0)])
def test_worked_examples(n, c, k, expected):
    np.testing.assert_allclose(pass_at_k(np.array([c]), n, k), [expected], atol=5e-7)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_equals_enumeration_over_all_subsets(n):
    for c in range(n + 1):
        solved = [i < c for i in range(n)]
        for k in range(1, n + 1):
            enumerated = np.mean([any(subset) for subset in combinations(solved, k)])
            np.testing.assert_allclose(pass_at_k(np.array([c]), n, k), [enumerated], atol=1e-12)


def test_is_unbiased_where_the_plug_in_estimate_is_not():
    rate, n, k = 0.2, 8, 4
    truth = 1 - (1 - rate) ** k
    c = np.random.default_rng(0).binomial(n, rate, size=20_000)
    estimate, plug_in = mean_pass_at_k(c, n, k), np.mean(1 - (1 - c / n) ** k)
    assert abs(estimate - truth) < 0.006
    assert abs(plug_in - truth) > 0.03


def test_prompts_may_have_different_numbers_of_samples():
    ragged = pass_at_k(np.array([3, 0, 6]), np.array([16, 10, 8]), 4)
    np.testing.assert_allclose(ragged, [0.607143, 0.0, 1.0], atol=5e-7)
    assert mean_pass_at_k([3, 0, 6], [16, 10, 8], 4) == pytest.approx(ragged.mean())


def test_pass_at_1_is_the_accuracy_and_large_counts_stay_finite():
    correct = np.array([0, 1, 500, 999, 1000])
    np.testing.assert_allclose(pass_at_k(correct, 1000, 1), correct / 1000, atol=1e-12)
    values = pass_at_k(correct, 1000, 512)
    assert np.isfinite(values).all()
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(values[1], 0.512, atol=1e-12)


def test_grows_with_k():
    values = [mean_pass_at_k([2, 5], 16, k) for k in range(1, 17)]
    assert (np.diff(values) >= 0).all()
    assert values[-1] == 1.0


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        ([1], 4, 5, "k=5 is more than samples=4"),
        ([1, 1], [8, 3], 4, "k=4 is more than samples=3"),
        ([1], 4, 0, "k=0"),
        ([1], 4, 1.5, "k=1.5"),
        ([2, 5], 4, 2, "correct=5 of prompt 1"),
        ([-1], 4, 2, "correct=-1"),
        ([0.5], 4, 2, "whole numbers"),
    ],
)
def test_bad_input_is_refused_by_name(correct, samples, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(np.array(correct), samples, k)


def test_a_mean_over_no_prompt_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        mean_pass_at_k(np.array([], dtype=int), 4, 2)
