"""Statistics of groups given as ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.statistics import (
    group_leader,
    group_max,
    group_mean,
    group_min,
    group_rank,
    group_size,
    group_std,
    group_sum,
)

# Ragged groups in no order: id 4 has four rows, id 1 two, id 0 one; the last row is absent and holds NaN.
GROUP = jnp.array([4, 1, 4, 4, 0, 1, 4, 1])
WEIGHT = jnp.array([1.0, 1, 1, 1, 1, 1, 1, 0])
VALUES = jnp.array([3.0, 5.0, 1.0, 7.0, 2.0, 9.0, 2.0, jnp.nan])


def by_hand(statistic):
    rows = [[v for v, g, w in zip(VALUES, GROUP, WEIGHT, strict=True) if g == group and w > 0] for group in GROUP]
    return [statistic(np.array(row)) for row in rows]


@pytest.mark.parametrize(
    "ours, numpys",
    [
        (group_sum, np.sum),
        (group_mean, np.mean),
        (group_min, np.min),
        (group_max, np.max),
        (lambda *a: group_std(*a, ddof=0), np.std),
        (group_std, lambda x: np.std(x, ddof=1) if len(x) > 1 else 0.0),
    ],
)
def test_every_row_gets_the_statistic_of_its_group(ours, numpys):
    np.testing.assert_allclose(jax.jit(ours)(VALUES, GROUP, WEIGHT), by_hand(numpys), rtol=1e-6)


def test_sizes_ranks_and_leaders():
    np.testing.assert_array_equal(group_size(GROUP, WEIGHT), [4, 2, 4, 4, 1, 2, 4, 2])
    np.testing.assert_array_equal(group_rank(VALUES, GROUP, WEIGHT)[:7], [2, 0, 0, 3, 0, 1, 1])
    np.testing.assert_array_equal(group_leader(GROUP, WEIGHT), [1, 1, 0, 0, 1, 0, 0, 0])
    assert group_rank(VALUES, GROUP, WEIGHT)[7] == 2  # absent rows rank last


def test_ties_rank_in_order_of_rows():
    np.testing.assert_array_equal(group_rank(jnp.ones(4), jnp.array([2, 0, 2, 2]), jnp.ones(4)), [0, 0, 1, 2])


def test_equal_values_have_exactly_their_own_mean_and_no_deviation():
    for value in (0.1, 1000.1, -3.3e-5):
        values = jnp.full(7, value)
        mean = group_mean(values, jnp.zeros(7, int), jnp.ones(7))
        np.testing.assert_array_equal(mean, values)
        np.testing.assert_array_equal(group_std(values, jnp.zeros(7, int), jnp.ones(7)), 0)


def test_weights_are_relative():
    weight = jnp.array([1.0, 2, 3, 4, 1, 2, 1, 0])
    for statistic in (group_mean, group_std):
        np.testing.assert_allclose(
            statistic(VALUES, GROUP, weight), statistic(VALUES, GROUP, 0.01 * weight), rtol=1e-5, err_msg=str(statistic)
        )
    np.testing.assert_allclose(
        group_mean(VALUES, GROUP, weight)[0], (3 * 1 + 1 * 3 + 7 * 4 + 2 * 1) / (1 + 3 + 4 + 1), rtol=1e-6
    )


def test_a_batch_without_rows_has_statistics_zero():
    for statistic in (group_sum, group_mean, group_std, group_min, group_max):
        np.testing.assert_array_equal(statistic(VALUES, GROUP, 0 * WEIGHT), 0)


def test_deviation_of_equal_values_has_a_finite_gradient():
    gradient = jax.jit(jax.grad(lambda x: group_std(x, jnp.zeros(3, int), jnp.ones(3)).sum()))(jnp.ones(3))
    assert np.isfinite(gradient).all()
