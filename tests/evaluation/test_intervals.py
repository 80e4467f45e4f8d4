"""Bootstrap intervals agree with scipy's, cover the truth, and are paired; the sign test is McNemar's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from jaxrl_llm.evaluation import mean_intervals, sign_test


def test_intervals_agree_with_those_of_scipy():
    values = np.random.default_rng(0).random((200, 1)) ** 3
    ours = mean_intervals(values, resamples=20_000)[0]
    theirs = bootstrap((values[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_about_95_in_100_intervals_hold_the_true_mean():
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        low, high = mean_intervals(rng.random((60, 1)) < 0.4, resamples=400)[0]
        held += low <= 0.4 <= high
    assert 0.90 <= held / 300 <= 0.99


def test_a_paired_difference_has_a_narrower_interval_than_its_sides():
    hard = np.random.default_rng(2).random(400)
    before, after = (hard < 0.5).astype(float), (hard < 0.55).astype(float)
    ends = mean_intervals(np.stack([before, after - before], axis=1))
    assert np.diff(ends[1]) < np.diff(ends[0])
    assert ends[1, 0] > 0


def test_values_that_do_not_apply_and_no_resamples_are_refused():
    with pytest.raises(ValueError, match="values holds NaN; leave out"):
        mean_intervals(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="resamples is 0; it must be at least 1"):
        mean_intervals(np.ones((3, 1)), resamples=0)


def test_the_same_seed_gives_the_same_and_a_constant_its_own_value():
    values = np.random.default_rng(3).random((50, 2))
    np.testing.assert_array_equal(mean_intervals(values), mean_intervals(values))
    np.testing.assert_array_equal(mean_intervals(np.ones((5, 1)))[0], [1.0, 1.0])


def test_the_sign_test_counts_only_problems_that_differ():
    assert sign_test([0, 1, 1, 0], [0, 1, 1, 0]) == 1.0
    assert sign_test([0] * 10 + [1] * 50, [1] * 10 + [1] * 50) == pytest.approx(2 * 0.5**10)
    assert sign_test([0, 1], [1, 0]) == 1.0


@pytest.mark.parametrize(("values", "level"), [(np.zeros((0, 1)), 0.95), (np.zeros(3), 0.95), (np.zeros((3, 1)), 1.0)])
def test_bad_input_is_refused(values, level):
    with pytest.raises(ValueError, match=r"row for each|level"):
        mean_intervals(values, level=level)
