"""Confidence intervals of means over problems, and of differences between two evaluations of the same problems.

Problems are resampled, not samples, since the samples of a problem are not independent.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxrl_llm.ranges import Count, Natural, ranged

RESAMPLES = 2000


@ranged
def mean_intervals(
    values: Float[np.ndarray, "N M"], *, level: float = 0.95, resamples: Count = RESAMPLES, seed: Natural = 0
) -> Float[np.ndarray, "M 2"]:
    """Bootstrap interval of the mean of each column, from `resamples` draws of N problems with replacement.

        [quantile_{(1-level)/2}, quantile_{(1+level)/2}] of mean_i v[I_i],   I ~ uniform(1..N)^N

    All columns use the same resampled problems, so the difference of two evaluations is a column of differences. If all
    problems have the same value the interval has width 0: with N problems that are all right, the failure rate may
    still be about 3 / N.

    Args:
      values: one row per problem.
      level: of the interval.
      resamples: bootstrap draws.
      seed: of the draws; the same seed gives the same interval.

    Returns:
      Lower and upper end of each column.

    Raises:
      ValueError: for no problem, NaN, or a level outside of (0, 1).
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 2 or not len(v):
        raise ValueError(f"values has the shape {v.shape}; give one row for each of at least one problem")
    if np.isnan(v).any():
        raise ValueError("values holds NaN; leave out the problems to which the number does not apply")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie in (0, 1), such as 0.95")
    count = len(v)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    means = draws @ v / count
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def sign_test(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "N"]) -> float:
    """Exact two-sided p-value of the sign test over the problems on which two evaluations differ.

    For values of 0 and 1 it is the exact McNemar test. 1 if no problem differs.

    >>> round(sign_test([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]), 6)
    0.0625
    """
    from scipy.stats import binomtest  # takes a second to import

    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    ahead, behind = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
