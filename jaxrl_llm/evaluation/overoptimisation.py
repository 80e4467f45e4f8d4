"""Quality of reward models: accuracy and calibration on pairs, and over-optimisation by a policy."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Literal, get_args

import numpy as np

Curve = Literal["direct", "best_of_n"]


def preference_metrics(
    better: Sequence[float], worse: Sequence[float], lengths: Sequence[tuple[int, int]] | None = None, *, bins: int = 10
) -> dict[str, float]:
    """Accuracy and calibration of scores on held-out pairs.

        accuracy = mean 1[b > w],   ties = mean 1[b = w],   loss = mean -log sigmoid(b - w)
        calibration_error = sum over bins of share * |mean of p - share that is right|

    with p = max(q, 1 - q), q = sigmoid(b - w), in equal bins over [1/2, 1]; a tie counts half. With lengths of both
    answers also `length_correlation`, the correlation of score gaps and length gaps: 1 for a reward model that only
    counts words.

    Args:
      better, worse: scores of each pair.
      lengths: tokens of (better, worse).
      bins: of the calibration.

    Raises:
      ValueError: for no pairs, different lengths of the lists, or scores that are not finite.

    Reference: On calibration of modern neural networks (1706.04599), of pairs.
    Certainty: recalled
    """
    b, w = np.asarray(better, np.float64), np.asarray(worse, np.float64)
    if b.shape != w.shape or b.ndim != 1 or not b.size or bins < 1:
        raise ValueError(
            f"better has the shape {b.shape}, worse {w.shape}, bins is {bins}; give one score of each a pair"
        )
    if not (np.isfinite(b) & np.isfinite(w)).all():
        raise ValueError(f"pair {np.flatnonzero(~(np.isfinite(b) & np.isfinite(w)))[0]} has a score that is not finite")
    gap = b - w
    p = 1 / (1 + np.exp(-np.minimum(np.abs(gap), 700)))
    right = np.where(gap == 0, 0.5, gap > 0)
    place = np.minimum(((p - 0.5) * 2 * bins).astype(int), bins - 1)
    off = np.bincount(place, weights=p - right, minlength=bins)
    found = {
        "accuracy": float((gap > 0).mean()),
        "ties": float((gap == 0).mean()),
        "loss": float(np.logaddexp(0, -gap).mean()),
        "calibration_error": float(np.abs(off).sum() / len(gap)),
    }
    if lengths is not None:
        longer = np.array([one - other for one, other in lengths], np.float64)
        spread = gap.std() * longer.std()
        centred = ((gap - gap.mean()) * (longer - longer.mean())).mean()
        found["length_correlation"] = float(centred / spread) if spread > 0 else 0.0
    return found


def preference_table(
    better: Sequence[float],
    worse: Sequence[float],
    sources: Sequence[str] | None = None,
    lengths: Sequence[tuple[int, int]] | None = None,
    *,
    bins: int = 10,
) -> list[dict[str, str | float]]:
    """`preference_metrics` of all pairs, and in further rows of the pairs of each source, the largest first.

    >>> rows = preference_table([1, 2, 0], [0, 3, -1], ["a", "b", "b"])
    >>> [(row["source"], row["pairs"], row["accuracy"]) for row in rows]
    [('all', 3, 0.6666666666666666), ('b', 2, 0.5), ('a', 1, 1.0)]

    Args:
      better, worse: scores of each pair.
      sources: source of each pair; None makes one row.
      lengths: tokens of (better, worse).
      bins: of the calibration.

    Raises:
      ValueError: as for `preference_metrics`, or if the numbers of sources and pairs differ.
    """
    b, w = np.asarray(better, np.float64), np.asarray(worse, np.float64)
    if sources is not None and len(sources) != len(b):
        raise ValueError(f"sources names {len(sources)} pairs, but there are {len(b)}; give one a pair")
    named = np.asarray(["all"] * len(b) if sources is None else list(sources))
    parts = [("all", np.ones(len(b), bool))]
    if sources is not None:
        kinds, counts = np.unique(named, return_counts=True)
        parts += [(str(kinds[i]), named == kinds[i]) for i in np.argsort(-counts, kind="stable")]
    rows: list[dict[str, str | float]] = []
    for name, among in parts:
        own = None if lengths is None else [one for one, kept in zip(lengths, among, strict=True) if kept]
        rows.append(
            {
                "source": name,
                "pairs": int(among.sum()),
                **preference_metrics(b[among].tolist(), w[among].tolist(), own, bins=bins),
            }
        )
    return rows


def overoptimisation_fit(kl: Sequence[float], gain: Sequence[float], *, curve: Curve = "direct") -> dict[str, float]:
    """Fit of a gold score as a function of the distance of a policy optimised for a proxy.

        direct     gain = d * (alpha - b * log d),   peak at d = exp(alpha / b - 1), of b * d
        best_of_n  gain = d * (alpha - b * d),       peak at d = alpha / (2 b), of alpha^2 / (4 b)

    with d = sqrt(KL), by least squares. `direct` is for RL and preference losses.

    Args:
      kl: KL divergence of several checkpoints from the initial policy, in nats, above 0.
      gain: gold score minus its initial value.
      curve: as above.

    Returns:
      `alpha`, `b`, and if b is above 0 `peak_root_kl` and `peak_gain`; a curve that only rises has no peak.

    Raises:
      ValueError: for fewer than two points, a KL that is not above 0, or an unknown curve.

    Reference: Scaling laws for reward model overoptimisation (2210.10760); of direct alignment (2406.02900).
    Certainty: recalled
    """
    if curve not in get_args(Curve):
        raise ValueError(f"curve is {curve!r}; it must be one of {', '.join(get_args(Curve))}")
    k, g = np.asarray(kl, np.float64), np.asarray(gain, np.float64)
    if k.ndim != 1 or k.shape != g.shape or len(k) < 2 or not (k > 0).all():
        raise ValueError(f"kl {k.tolist()} and gain {g.tolist()} must be two points or more, with each KL above 0")
    d = np.sqrt(k)
    second = -d * (np.log(d) if curve == "direct" else d)
    (alpha, b), *_ = np.linalg.lstsq(np.stack([d, second], 1), g, rcond=None)
    found = {"alpha": float(alpha), "b": float(b)}
    if b > 0:
        peak = exp(alpha / b - 1) if curve == "direct" else alpha / (2 * b)
        found |= {"peak_root_kl": peak, "peak_gain": b * peak if curve == "direct" else alpha**2 / (4 * b)}
    return found


def performance_gap_recovered(weak: float, weak_to_strong: float, strong: float) -> float:
    """Performance gap recovered by weak-to-strong training: (w2s - weak) / (strong - weak).

    >>> round(performance_gap_recovered(0.6, 0.7, 0.85), 6)
    0.4

    Raises:
      ValueError: if weak and strong are equal.

    Reference: Weak-to-strong generalisation (2312.09390).
    Certainty: verified
    """
    if weak == strong:
        raise ValueError(f"weak and strong are both {weak}; there is no gap to recover")
    return (weak_to_strong - weak) / (strong - weak)
