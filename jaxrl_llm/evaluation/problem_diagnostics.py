"""Diagnostics of data sets and problems: coverage, effective horizon, transfer after coaching."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Coverage(NamedTuple):
    """Measures of a data set of behaviour.

    Attributes:
      sa_co: number of distinct (state, action) pairs divided by that of a reference set.
      log_sa_co: the ratio of their logarithms; None if the reference has one pair.
      tq: (mean return - return of a random policy) / (best return - return of a random policy).
    """

    sa_co: float
    log_sa_co: float | None
    tq: float


def token_pairs(tokens: Sequence[Sequence[int]], *, context: int = 4) -> list[tuple[tuple[int, ...], int]]:
    """(the last `context` tokens, the next token) of sequences: states and actions of text.

    >>> token_pairs([[1, 2, 3]], context=1)
    [((), 1), ((1,), 2), ((2,), 3)]
    """
    return [(tuple(row[max(0, i - context) : i]), row[i]) for row in tokens for i in range(len(row))]


def dataset_coverage(
    pairs: Sequence, reference: Sequence, returns: Sequence[float], *, best: float, random: float = 0.0
) -> Coverage:
    """Exploration (SACo) and exploitation (TQ) of a set of offline data.

    Methods without a constraint on the policy need a high SACo, constrained methods need both, cloning needs only TQ.
    TQ may exceed 1.

    Args:
      pairs: (state, action) of the data, see `token_pairs`.
      reference: those of an online run.
      returns: of the data's episodes.
      best: highest return of the online run.
      random: return of a random policy.

    Raises:
      ValueError: for an empty set, or a best return equal to that of a random policy.

    Reference: Understanding the effects of dataset characteristics (2111.04714)
    Certainty: verified
    """
    own, other = len(set(pairs)), len(set(reference))
    if not own or not other or not len(returns) or best == random:
        raise ValueError(
            f"there are {own} and {other} distinct pairs, {len(returns)} returns, best={best} and random={random}; "
            "give data that is not empty, and a best return above the random one"
        )
    ratio = None if other == 1 else math.log(own) / math.log(other)
    return Coverage(own / other, ratio, (float(np.mean(returns)) - random) / (best - random))


class Horizon(NamedTuple):
    """The effective horizon for one lookahead.

    Attributes:
      k: number of lookahead steps, on values of the exploration policy, with which greedy actions are optimal.
      gap: smallest difference between the best and the next action on the greedy paths.
      horizon: k + log_A(1 / gap^2); samples needed grow like T A^horizon.
    """

    k: int
    gap: float
    horizon: float


def effective_horizons(
    returns: Callable[[tuple[int, ...]], float], *, actions: int, length: int, most_k: int = 3
) -> list[Horizon]:
    """Horizons of a small tree of tokens under uniform exploration, for each lookahead that solves it.

        Q^1 = mean return over uniform continuations,   Q^{k+1}(p, a) = max_b Q^k(p + a, b)
        H_k = k + log_A(1 / gap_k^2)   for k with which acting greedily on Q^k is optimal, ties broken any way

    The effective horizon is the smallest of them.

    Args:
      returns: of each whole sequence; rewards within it are part of it.
      actions: A, tokens at each position.
      length: tokens of a sequence; all A^length sequences are enumerated.
      most_k: the longest lookahead to try.

    Returns:
      One entry for each k up to `most_k` that solves the tree, ascending.

    Reference: Bridging RL theory and practice with the effective horizon (2304.09853)
    Certainty: recalled
    """

    def mean(prefix: tuple[int, ...]) -> float:
        if len(prefix) == length:
            return returns(prefix)
        return float(np.mean([mean((*prefix, a)) for a in range(actions)]))

    def best(prefix: tuple[int, ...]) -> float:
        return returns(prefix) if len(prefix) == length else max(best((*prefix, a)) for a in range(actions))

    def value(prefix: tuple[int, ...], k: int) -> float:
        """Q^k of the last token of a prefix."""
        if k == 1 or len(prefix) == length:
            return mean(prefix)
        return max(value((*prefix, a), k - 1) for a in range(actions))

    def least_gap(prefix: tuple[int, ...], k: int) -> float | None:
        """The smallest gap below a prefix; None if some greedy choice is not optimal."""
        if len(prefix) == length:
            return math.inf
        values = [value((*prefix, a), k) for a in range(actions)]
        winners = [a for a in range(actions) if values[a] >= max(values) - 1e-12]
        rest = [values[a] for a in range(actions) if a not in winners]
        gap = max(values) - max(rest) if rest else math.inf
        for a in winners:
            below = least_gap((*prefix, a), k) if best((*prefix, a)) >= best(prefix) - 1e-12 else None
            if below is None:
                return None
            gap = min(gap, below)
        return gap

    found = []
    for k in range(1, most_k + 1):
        gap = least_gap((), k)
        if gap is not None:
            reach = 0.0 if math.isinf(gap) else math.log(1 / gap**2) / math.log(actions)
            found.append(Horizon(k, gap, k + reach))
    return found


def coach_transfer(before: Sequence[float], during: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """The gain from training with feedback that remains without feedback, on the same problems.

        coached = during - before,   kept = after - before,   retained = kept / coached (0 if coached is 0)

    >>> {name: round(value, 6) for name, value in coach_transfer([.2, .4], [.8, .8], [.6, .5]).items()}
    {'coached': 0.5, 'kept': 0.25, 'retained': 0.5}

    Raises:
      ValueError: for different numbers of problems, or none.

    Reference: IMBUE (2402.12556)
    Certainty: recalled
    """
    if not len(before) == len(during) == len(after) or not len(before):
        raise ValueError(
            f"there are {len(before)}, {len(during)} and {len(after)} scores; give those of the same problems"
        )
    coached = float(np.mean(during) - np.mean(before))
    kept = float(np.mean(after) - np.mean(before))
    return {"coached": coached, "kept": kept, "retained": kept / coached if coached else 0.0}


def spurious_rewards(
    correct: Sequence[float], well_formed: Sequence[float], chance: Sequence[float]
) -> dict[str, np.ndarray]:
    """Uninformative rewards, to test whether a task needs true rewards: if pass@k of the initial model is high,
    training with them works almost as well.

        truth = f c,   format = f,   random = f 1[u >= 1/2],   incorrect = f (1 - c)

    Args:
      correct: c, whether each answer is right.
      well_formed: f, whether it has the required form.
      chance: u, uniform in [0, 1), fresh for each sample.

    Raises:
      ValueError: for different lengths.

    Reference: Model-task alignment (2508.21188)
    Certainty: verified
    """
    c, f, u = (np.asarray(each, np.float64) for each in (correct, well_formed, chance))
    if not c.shape == f.shape == u.shape:
        raise ValueError(f"shapes {c.shape}, {f.shape} and {u.shape} must be the same: one number a sample")
    return {"truth": f * c, "format": f, "random": f * (u >= 0.5), "incorrect": f * (1 - c)}
