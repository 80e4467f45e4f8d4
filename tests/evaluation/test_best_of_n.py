"""Best-of-n: the worked example, all subsets, and pass@k where the score is the verifier."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from jaxrl_llm.evaluation import best_of_n_accuracy, best_of_n_kl, pass_at_k


def test_the_worked_example():
    assert best_of_n_accuracy([0.1, 0.9, 0.5, 0.3], [0, 1, 1, 0], 2) == pytest.approx(0.833333, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_enumeration_over_all_subsets_with_ties(seed):
    rng = np.random.default_rng(seed)
    scores, correct = rng.integers(0, 4, 7), rng.random(7)
    for k in range(1, 8):
        exact = np.mean(
            [
                np.mean([correct[i] for i in subset if scores[i] == max(scores[j] for j in subset)])
                for subset in combinations(range(7), k)
            ]
        )
        assert best_of_n_accuracy(scores, correct, k) == pytest.approx(exact)


def test_with_the_verifier_as_the_score_it_is_pass_at_k():
    correct = [0, 1, 0, 0, 1, 0]
    for k in range(1, 7):
        assert best_of_n_accuracy(correct, correct, k) == pytest.approx(pass_at_k([2], 6, k)[0])
    assert best_of_n_accuracy(range(6), correct, 1) == pytest.approx(np.mean(correct))


def test_the_divergence_bound():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(16) == pytest.approx(np.log(16) - 15 / 16)


@pytest.mark.parametrize(
    ("scores", "correct", "k", "message"),
    [([1], [1], 2, "k=2"), ([1, 2], [1], 1, "shape"), ([np.nan, 1], [1, 0], 1, r"scores\[0\]")],
)
def test_bad_input_is_refused_by_name(scores, correct, k, message):
    with pytest.raises(ValueError, match=message):
        best_of_n_accuracy(scores, correct, k)
