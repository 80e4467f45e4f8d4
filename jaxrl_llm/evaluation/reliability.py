"""Calibration: agreement of stated confidences with the accuracy of the answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class ReliabilityBin(NamedTuple):
    """One bin of a reliability curve.

    Attributes:
      count: samples in it.
      confidence: their mean confidence; NaN in an empty bin.
      accuracy: share of right samples; NaN in an empty bin.
    """

    count: int
    confidence: float
    accuracy: float


def reliability_curve(
    confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"], *, bins: int = 10
) -> list[ReliabilityBin]:
    """Mean confidence and accuracy in bins of equal width; bin b holds (b / bins, (b + 1) / bins], 0 is in the first.

    Args:
      confidence: in [0, 1], one per sample.
      correct: whether the sample is right.
      bins: number of bins.

    Returns:
      One entry per bin, ascending.

    Raises:
      ValueError: for no samples, different lengths, a confidence outside of [0, 1] or NaN, or less than one bin.

    Reference: On calibration of modern neural networks (1706.04599)
    """
    c, y = _checked(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    place = np.clip(np.ceil(c * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=values, minlength=bins) / count for values in (c, y)]
    return [ReliabilityBin(int(n), float(mean), float(right)) for n, mean, right in zip(count, *means, strict=True)]


def expected_calibration_error(
    confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"], *, bins: int = 10
) -> float:
    """Expected calibration error: the gap between confidence and accuracy, averaged over samples.

        ECE = sum_b (n_b / N) |mean confidence in b - accuracy in b|

    A constant confidence has ECE |confidence - accuracy| without distinguishing right from wrong answers: read it
    together with `auroc`.

    >>> round(expected_calibration_error([.95, .85, .75, .65, .55, .95], [1, 1, 0, 1, 0, 0]), 6)
    0.45

    Args:
      confidence, correct, bins: as for `reliability_curve`.

    Returns:
      A number in [0, 1]; 0 is the best.

    Raises:
      ValueError: as `reliability_curve`.

    Reference: On calibration of modern neural networks (1706.04599)
    """
    curve = [each for each in reliability_curve(confidence, correct, bins=bins) if each.count]
    return sum(each.count * abs(each.confidence - each.accuracy) for each in curve) / sum(each.count for each in curve)


def brier_score(confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"]) -> float:
    """Mean of (confidence - right)^2, in [0, 1]; 0 is the best, and 0.25 the score of a constant 0.5.

    >>> round(brier_score([.95, .85, .75, .65, .55, .95], [1, 1, 0, 1, 0, 0]), 6)
    0.319167

    Args:
      confidence, correct: as for `reliability_curve`.

    Raises:
      ValueError: as `reliability_curve`.
    """
    c, y = _checked(confidence, correct)
    return float(np.mean((c - y) ** 2))


def auroc(confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"]) -> float:
    """Probability that a right sample has a higher confidence than a wrong one; ties count half.

        AUROC = P(c+ > c-) + P(c+ = c-) / 2

    >>> round(auroc([.95, .85, .75, .65, .55, .95], [1, 1, 0, 1, 0, 0]), 6)
    0.611111

    Args:
      confidence, correct: as for `reliability_curve`; any finite numbers are allowed as confidence here.

    Returns:
      A number in [0, 1]; 0.5 is chance. NaN if all samples are right, or all are wrong.

    Raises:
      ValueError: for no samples, different lengths or NaN.
    """
    from scipy.stats import rankdata  # takes a second to import

    c, y = _checked(confidence, correct, bounded=False)
    right, wrong = y.sum(), len(y) - y.sum()
    if not right or not wrong:
        return float("nan")
    return float((rankdata(c)[y > 0].sum() - right * (right + 1) / 2) / (right * wrong))


def accuracy_at_coverage(
    confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"], *, coverage: float = 0.5
) -> float:
    """Accuracy of the most confident share of the samples; ties at the threshold count in part.

    Args:
      confidence, correct: as for `reliability_curve`.
      coverage: the answered share, in (0, 1].

    Raises:
      ValueError: as `reliability_curve`, or for a coverage outside of (0, 1].
    """
    c, y = _checked(confidence, correct, bounded=False)
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage={coverage} must lie in (0, 1]: it is the share of samples that is answered")
    kept = max(1, round(coverage * len(c)))
    border = np.sort(c)[-kept]
    above, tied = c > border, c == border
    return float((y[above].sum() + (kept - above.sum()) * y[tied].mean()) / kept)


def _checked(confidence, correct, *, bounded: bool = True) -> tuple[np.ndarray, np.ndarray]:
    c, y = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if c.ndim != 1 or c.shape != y.shape or not len(c):
        raise ValueError(
            f"confidence has the shape {c.shape} and correct {y.shape}; give one number each for at least one sample, "
            "and leave out samples that state no confidence"
        )
    bad = ~np.isfinite(c) | ((c < 0) | (c > 1) if bounded else False)
    if bad.any():
        raise ValueError(
            f"confidence[{np.flatnonzero(bad)[0]}]={c[bad][0]} must lie in [0, 1]; leave out samples that state none"
        )
    return c, y
