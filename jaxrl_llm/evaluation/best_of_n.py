"""Best-of-n: expected correctness of the best-scored sample of k."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, log

import numpy as np


def best_of_n_accuracy(scores: Sequence[float], correct: Sequence[float], k: int) -> float:
    """Expected correctness of the best-scored of k samples of one prompt, over all k-subsets of its n samples.

        sum_{i=1..n} C(i-1, k-1) / C(n, k) * correct_(i),   samples by ascending score

    Among samples of equal score the choice is uniformly random. With the verifier as the score the result is
    `pass_at_k`.

    >>> round(best_of_n_accuracy([.1, .9, .5, .3], [0, 1, 1, 0], k=2), 6)
    0.833333

    Args:
      scores: of the samples, any finite numbers.
      correct: correctness of each sample, in [0, 1].
      k: number of samples to choose from.

    Raises:
      ValueError: k < 1 or above n, different lengths, or a score that is not finite.

    Reference: Learning to summarize from human feedback (2009.01325)
    Certainty: verified
    """
    s, y = np.asarray(scores, np.float64), np.asarray(correct, np.float64)
    n = len(s)
    if s.ndim != 1 or s.shape != y.shape:
        raise ValueError(f"scores has the shape {s.shape} and correct {y.shape}; give one number each a sample")
    if k != int(k) or not 1 <= k <= n:
        raise ValueError(f"k={k!r} must be a whole number from 1 to the {n} samples of the prompt")
    if not np.isfinite(s).all():
        raise ValueError(f"scores[{np.flatnonzero(~np.isfinite(s))[0]}] is not finite; give every sample a number")
    _, group = np.unique(s, return_inverse=True)
    picked = np.asarray([comb(i, k - 1) / comb(n, k) for i in range(n)])
    # The probability that a score is the highest of k, split among samples of equal score.
    share = np.bincount(group, weights=picked[np.argsort(np.argsort(s, kind="stable"), kind="stable")])
    return float(share @ (np.bincount(group, weights=y) / np.bincount(group)))


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats of the KL divergence of best-of-n sampling from the policy: ln n - (n - 1) / n.

    Reference: Theoretical guarantees on the best-of-n alignment policy (2401.01879)
    Certainty: verified
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return log(n) - (n - 1) / n
