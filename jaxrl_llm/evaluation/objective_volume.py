"""Hypervolume of the objective space dominated by validation points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume dominated by the points above a reference point; all objectives are maximised.

    >>> round(hypervolume([[0.5, 0.2], [0.3, 0.6]], [0, 0]), 6)
    0.22

    Raises:
      ValueError: for a point of another size than the reference.

    Reference: Dynamic reward weighting (2509.11452).
    Certainty: verified
    """
    origin = np.asarray(reference, np.float64)
    if any(len(point) != len(origin) for point in points):
        raise ValueError(f"points {points} and reference {list(reference)} must have one number an objective each")
    inside = [np.asarray(point, np.float64) - origin for point in points]
    return float(_volume(np.array([point for point in inside if (point > 0).all()]).reshape(-1, len(origin))))


def hypervolume_factor(
    points: Sequence[Sequence[float]], new: Sequence[float], reference: Sequence[float]
) -> tuple[float, float]:
    """(gain in hypervolume by a new validation point, factor of all rewards until the next one).

        gain = max(0, HV(points + new) - HV(points)),   factor = 1/2 + 3/2 tanh(gain)

    The factor cancels if advantages are divided by their standard deviation: use a mean-only baseline.

    Reference: Dynamic reward weighting (2509.11452).
    Certainty: verified
    """
    gain = max(0.0, hypervolume([*points, new], reference) - hypervolume(points, reference))
    return gain, 0.5 + 1.5 * float(np.tanh(gain))


def _volume(points: np.ndarray) -> float:
    """The volume by slices of the last objective, from the highest down."""
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    order = points[np.argsort(-points[:, -1])]
    heights = np.append(order[:, -1], 0.0)
    return sum(
        (heights[i] - heights[i + 1]) * _volume(order[: i + 1, :-1])
        for i in range(len(order))
        if heights[i] > heights[i + 1]
    )
