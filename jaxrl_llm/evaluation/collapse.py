"""Collapse of training without labels: the peak of accuracy, and the sharpening of the majority."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.ranges import Count, NonNegative, Positive, Share, ranged


class Collapse(NamedTuple):
    """The peak of an accuracy curve, and whether it fell afterwards.

    Attributes:
      step: of the peak of the smoothed curve, counted from 0.
      collapsed: whether the end is below the peak by more than a margin.
    """

    step: int
    collapsed: bool


@ranged
def collapse_step(accuracy: Sequence[float], *, window: Count = 5, margin: NonNegative = 0.02) -> Collapse:
    """The step of the highest accuracy of a run without labels; later training only sharpens the policy.

        step = argmax of the moving mean;   collapsed = peak - end > margin

    Args:
      accuracy: of each evaluation.
      window: number of evaluations of the trailing moving mean.
      margin: smallest fall that counts as a collapse.

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
    """The share of the majority answer under exact KL-regularised improvement, if it is rewarded with 1.

        p <- p e^(1 / beta) / (p e^(1 / beta) + 1 - p)

    logit(p) grows by 1 / beta per round, whether or not the answer is right.

    Args:
      start: share before the first round.
      beta: coefficient of the KL penalty.
      rounds: number of rounds.

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
