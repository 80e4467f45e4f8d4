"""Calibration: the worked examples, the definitions counted by hand, and what is refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from jaxrl_llm.evaluation import (
    accuracy_at_coverage,
    auroc,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)

CONFIDENCE, CORRECT = [0.95, 0.85, 0.75, 0.65, 0.55, 0.95], [1, 1, 0, 1, 0, 0]


def random_answers(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 11, 60) / 10, rng.integers(0, 2, 60)


def test_the_worked_examples():
    assert expected_calibration_error(CONFIDENCE, CORRECT) == pytest.approx(0.45)
    assert brier_score(CONFIDENCE, CORRECT) == pytest.approx(0.319167, abs=1e-6)
    assert auroc(CONFIDENCE, CORRECT) == pytest.approx(0.611111, abs=1e-6)
    constant = [0.7] * 4, [1, 1, 0, 0]
    assert expected_calibration_error(*constant) == pytest.approx(0.2)
    assert brier_score(*constant) == pytest.approx(0.29)
    assert auroc(*constant) == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_counted_pair_by_pair_and_bin_by_bin(seed):
    c, y = random_answers(seed)
    pairs = [(a > b) + 0.5 * (a == b) for a, b in product(c[y == 1], c[y == 0])]
    assert auroc(c, y) == pytest.approx(np.mean(pairs))
    assert auroc(c, y) == pytest.approx(mannwhitneyu(c[y == 1], c[y == 0]).statistic / len(pairs))
    assert auroc(1 - c, y) == pytest.approx(1 - auroc(c, y))
    gap, bins = 0.0, [(0.0, 0.1), *((low / 10, (low + 1) / 10) for low in range(1, 10))]
    for place, (low, high) in enumerate(bins):
        inside = [i for i in range(60) if low - 1e-12 < c[i] <= high + 1e-12 and (c[i] > low + 1e-12 or place == 0)]
        curve = reliability_curve(c, y)[place]
        assert curve.count == len(inside)
        if inside:
            gap += abs(sum(c[i] for i in inside) - sum(y[i] for i in inside)) / 60
            assert curve.accuracy == pytest.approx(np.mean(y[inside]))
    assert expected_calibration_error(c, y) == pytest.approx(gap)
    assert accuracy_at_coverage(c, y, coverage=1.0) == pytest.approx(y.mean())


def test_accuracy_at_coverage_shares_a_tie_at_the_border():
    assert accuracy_at_coverage([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0], coverage=0.5) == pytest.approx(0.75)


def test_samples_that_are_all_right_have_no_auroc():
    assert np.isnan(auroc([0.2, 0.4], [1, 1]))


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [([], [], "at least one sample"), ([0.5], [1, 0], "shape"), ([1.2], [1], r"\[0\]=1.2"), ([np.nan], [1], "nan")],
)
def test_bad_input_is_refused_by_name(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        brier_score(confidence, correct)
