"""Whether training without labels has collapsed: when accuracy turned, and how sure the majority becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.ranges import Count, NonNegative, Positive, Share, ranged


class Collapse(NamedTuple):
    """Where a curve of accuracy has its peak, and whether it fell from there.

    Attributes:
      step: of the peak of the smoothed curve, counted from 0.
      collapsed: the end lies below the peak by more than a margin.
    """

    step: int
    collapsed: bool


@ranged
def collapse_step(accuracy: Sequence[float], *, window: Count = 5, margin: NonNegative = 0.02) -> Collapse:
    """The step at which the accuracy of a run without labels is highest: later training only makes the model surer.

        step = argmax of the moving mean;   collapsed = peak - end > margin

    Args:
      accuracy: of each evaluation.
      window: evaluations that a moving mean is taken over, the last ones up to each.
      margin: fall that counts.

    Raises:
      ValueError: for an empty curve.

    Reference: how far can unsupervised RLVR scale (2603.08660).
    Certainty: reconstructed
    """
    if not len(accuracy):
        raise ValueError("accuracy is empty; give at least one evaluation")
    values = np.asarray(accuracy, np.float64)
    smooth = np.array([values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)])
    step = int(smooth.argmax())
    return Collapse(step, bool(smooth[step] - smooth[-1] > margin))


@ranged
def majority_sharpening(start: Share, *, beta: Positive, rounds: Count) -> np.ndarray:
    """The share of the majority answer when it is rewarded with 1 under exact KL-regularised improvement.

        p <- p e^(1 / beta) / (p e^(1 / beta) + 1 - p)

    logit(p) grows by 1 / beta a round, whether or not the answer is right.

    Args:
      start: share before the first round.
      beta: of the KL penalty.
      rounds: of improvement.

    Returns:
      rounds + 1 shares, the first of them `start`.

    Reference: how far can unsupervised RLVR scale (2603.08660).
    Certainty: reconstructed
    """
    shares = [float(start)]
    for _ in range(rounds):
        p = shares[-1]
        shares.append(p / (p + (1 - p) * np.exp(-1 / beta)))
    return np.array(shares)
