"""Label noise in preference pairs: detection by an ensemble of reward models, and correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Action = Literal["keep", "smooth", "flip"]


def preference_strength(
    better: Sequence[Sequence[float]], worse: Sequence[Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, population standard deviation) over reward models of the score difference of each pair, better - worse.

    Args:
      better, worse: scores by model and pair, of models trained with different seeds or orders of the data.

    Raises:
      ValueError: for scores of different shapes, or scores that are not finite.

    Reference: Secrets of RLHF II, MOSS-RLHF (2401.06080).
    Certainty: verified
    """
    b, w = np.asarray(better, np.float64), np.asarray(worse, np.float64)
    if b.ndim != 2 or b.shape != w.shape:
        raise ValueError(f"better has the shape {b.shape} and worse {w.shape}; both must be [models, pairs]")
    if not (np.isfinite(b) & np.isfinite(w)).all():
        raise ValueError("a score is not finite; give a finite score for every model and pair")
    gap = b - w
    return gap.mean(0), gap.std(0)


def label_actions(strength: Sequence[float], *, flip: float = 0.1, smooth: float = 0.3) -> list[Action]:
    """The action for each pair by its strength: flip the lowest share, smooth the next one, keep the rest.

    >>> label_actions([0.5, -1.2, 0.1, 2, -0.3, 0.9, 0, 1.5, -0.1, 0.7]).count("smooth")
    2

    Args:
      strength: mean gap of each pair (`preference_strength`); a pair above 0 is never flipped.
      flip: largest share of pairs to flip.
      smooth: share up to which pairs get `label_smoothing`, including the flipped ones.

    Raises:
      ValueError: for shares that are not 0 <= flip <= smooth <= 1.

    Reference: Secrets of RLHF II, MOSS-RLHF (2401.06080).
    Certainty: recalled
    """
    if not 0 <= flip <= smooth <= 1:
        raise ValueError(f"flip is {flip} and smooth is {smooth}; 0 <= flip <= smooth <= 1 must hold")
    mu = np.asarray(strength, np.float64)
    place = np.argsort(np.argsort(mu, kind="stable"), kind="stable")
    low = [round(share * len(mu)) for share in (flip, smooth)]
    return [
        "flip" if n < low[0] and m < 0 else "smooth" if n < low[1] else "keep" for n, m in zip(place, mu, strict=True)
    ]
