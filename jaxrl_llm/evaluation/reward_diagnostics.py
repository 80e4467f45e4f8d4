"""Informativeness and distances of rewards, computed before training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def informativeness(advantages: Float[np.ndarray, "P G"], rewards: Float[np.ndarray, "P G"]) -> float:
    """Informativeness of a reward for the current policy, relative to the advantages of a teacher.

        I(R | pi) = mean over prompts of Cov over samples( A_teacher, R )

    A prompt with equal advantages, equal rewards or a single sample contributes 0: its reward gives no signal.

    >>> informativeness([[1.0, -1.0]], [[1.0, 0.0]])
    0.5

    Args:
      advantages: of the samples under the teacher, or from a verifier.
      rewards: the candidate's, of the same samples.

    Raises:
      ValueError: for other shapes than [P, G] of both.

    Reference: ExpRD (2402.07019)
    Certainty: reconstructed
    """
    a, r = _two(advantages, rewards)
    return float(((a - a.mean(1, keepdims=True)) * (r - r.mean(1, keepdims=True))).mean())


def horizon_informativeness(
    rewards: Float[np.ndarray, "S A"],
    transitions: Float[np.ndarray, "S A S"],
    optimal: Sequence[int],
    gaps: Float[np.ndarray, "S"],
    *,
    discount: float,
    horizons: Sequence[int] = (1, 4, 8, 16, 32),
) -> float:
    """How soon a designed reward reveals the optimal action of a tabular problem; 0 is the best.

        Q_0 = R,   Q_h = R + discount * P Q_{h-1}(., pi*)
        I = - sum_h sum_s sum_{a not optimal} max(0, gap_s - (Q_h(s, pi*_s) - Q_h(s, a)))

    Args:
      rewards: the candidate's.
      transitions: probability of the next state.
      optimal: the optimal action of each state.
      gaps: its margin over the next action under the true reward.
      discount: discount factor.
      horizons: numbers of lookahead steps.

    Raises:
      ValueError: for shapes that do not fit.

    Reference: ExpRD (2402.07019)
    Certainty: verified
    """
    r, p, best = np.asarray(rewards, np.float64), np.asarray(transitions, np.float64), np.asarray(optimal)
    if p.shape != (*r.shape, r.shape[0]) or best.shape != r.shape[:1] or np.shape(gaps) != r.shape[:1]:
        raise ValueError(
            f"rewards {r.shape}, transitions {p.shape} and optimal {best.shape} do not fit: [S A], [S A S], [S]"
        )
    states, total, q = np.arange(len(r)), 0.0, r
    for step in range(max(horizons) + 1):
        if step:
            q = r + discount * p @ q[states, best]
        if step in horizons:
            short = np.maximum(0.0, np.asarray(gaps)[:, None] - (q[states, best][:, None] - q))
            short[states, best] = 0.0
            total -= float(short.sum())
    return total


def starc_distance(first: Float[np.ndarray, "P G"], second: Float[np.ndarray, "P G"]) -> float:
    """Distance of two rewards of the same answers that ignores prompt-wise offsets and scale, which do not change
    policies.

        d = || C(r1) / |C(r1)| - C(r2) / |C(r2)| || / 2,   C centres the answers of each prompt

    It is sqrt((1 - rho) / 2) with rho the correlation within prompts: 0 if they differ only by scale, 1 if they are
    opposite. For a reward that is constant in every prompt, C(r) / |C(r)| is defined as 0.

    >>> round(starc_distance([[1, 2, 3]], [[2, 1, 3]]), 6)
    0.5

    Raises:
      ValueError: for other shapes than [P, G] of both.

    Reference: STARC (2309.15257), of one-step problems
    Certainty: reconstructed
    """
    parts = [_unit(each - each.mean(1, keepdims=True)) for each in _two(first, second)]
    return float(np.linalg.norm(parts[0] - parts[1]) / 2)


def tabular_starc_distance(
    first: Float[np.ndarray, "S A S"],
    second: Float[np.ndarray, "S A S"],
    transitions: Float[np.ndarray, "S A S"],
    *,
    discount: float,
    potential: bool = False,
) -> float:
    """STARC distance of two rewards of a tabular problem, in [0, 2].

        C(R)(s, a, s') = E_{s'}[ R + discount V(s') - V(s) ],   or without the expectation where `potential`

    V is the value of the uniform policy under R; C is divided by its Euclidean norm over all entries. For a state with
    a single action the expectation makes C equal to 0.

    Raises:
      ValueError: for shapes that do not fit, or a discount outside of [0, 1).

    Reference: STARC (2309.15257)
    Certainty: verified
    """
    p = np.asarray(transitions, np.float64)
    if not 0 <= discount < 1 or np.shape(first) != p.shape or np.shape(second) != p.shape:
        raise ValueError(
            f"rewards {np.shape(first)}, {np.shape(second)} and transitions {p.shape} must share one shape [S A S], "
            f"and discount={discount} must lie in [0, 1)"
        )

    def canonical(reward: np.ndarray) -> np.ndarray:
        values = np.linalg.solve(np.eye(len(p)) - discount * p.mean(1), (p * reward).sum(2).mean(1))
        shaped = reward + discount * values[None, None, :] - values[:, None, None]
        return _unit(shaped if potential else np.broadcast_to((p * shaped).sum(2, keepdims=True), p.shape))

    return float(np.linalg.norm(canonical(np.asarray(first, float)) - canonical(np.asarray(second, float))))


def one_against_many(correct: Float[np.ndarray, "P"], wrong: Float[np.ndarray, "P W"]) -> dict[str, float]:
    """Accuracy of scores that compare one right with many wrong solutions (RewardMATH).

        accuracy = mean 1[c > max w],   accuracy_with_ties = mean 1[c >= max w]
        mrr = mean 1 / (1 + #{w >= c}),   pairwise = share of pairs with c > w

    Accuracy against many, not the pairwise accuracy, predicts the accuracy of best-of-n.

    Raises:
      ValueError: for other shapes than [P] and [P, W].

    Reference: RewardMATH (2410.01729)
    Certainty: verified
    """
    c, w = np.asarray(correct, np.float64), np.asarray(wrong, np.float64)
    if w.ndim != 2 or c.shape != w.shape[:1] or not w.size:
        raise ValueError(
            f"correct has the shape {c.shape} and wrong {w.shape}; give one right and W wrong scores a problem"
        )
    return {
        "accuracy": float((c > w.max(1)).mean()),
        "accuracy_with_ties": float((c >= w.max(1)).mean()),
        "mrr": float((1 / (1 + (w >= c[:, None]).sum(1))).mean()),
        "pairwise": float((c[:, None] > w).mean()),
    }


def step_score_summaries(scores: Sequence[float]) -> dict[str, float]:
    """The usual aggregations of the step scores of a process reward model.

    min, max, last, product, mean, geometric mean, sigmoid of the mean log-odds, and mean odds. Scores are clipped to
    [1e-6, 1 - 1e-6] in the last two; a solution without steps scores 0.5.

    Reference: RewardMATH (2410.01729)
    Certainty: verified
    """
    p = np.asarray(scores if len(scores) else [0.5], np.float64)
    inner = np.clip(p, 1e-6, 1 - 1e-6)
    odds = inner / (1 - inner)
    return {
        "min": float(p.min()),
        "max": float(p.max()),
        "last": float(p[-1]),
        "product": float(p.prod()),
        "mean": float(p.mean()),
        "geometric_mean": float(p.prod() ** (1 / len(p))),
        "mean_logit": float(1 / (1 + np.exp(-np.log(odds).mean()))),
        "mean_odds": float(odds.mean()),
    }


def verdict_report(
    verdicts: Sequence[float], truth: Sequence[float], subgoals: Sequence[str] | None = None
) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of a judge that decides whether an action reaches a subgoal.

    All subgoals have equal weight, independent of their number of transitions. Without positives, precision, recall and
    F1 are 0.

    >>> verdict_report([1, 1, 0, 0], [1, 0, 1, 0])
    {'accuracy': 0.5, 'precision': 0.5, 'recall': 0.5, 'f1': 0.5}

    Args:
      verdicts: above 1/2 for a hit.
      truth: the true labels, in the same form.
      subgoals: name of the subgoal of each; None: one for all.

    Raises:
      ValueError: for none, or lists of different lengths.

    Reference: CALM (2409.12798)
    Certainty: verified
    """
    said, true = np.asarray(verdicts, float) > 0.5, np.asarray(truth, float) > 0.5
    names = np.zeros(len(said), int) if subgoals is None else np.unique(np.asarray(subgoals), return_inverse=True)[1]
    if said.shape != true.shape or not len(said) or names.shape != said.shape:
        raise ValueError(f"{len(said)} verdicts, {len(true)} truths, {len(names)} subgoals; give one of each, and some")
    share = 1.0 / np.bincount(names)[names]
    hits, said_hits, true_hits = ((share * x).sum() for x in (said & true, said, true))
    precision, recall = (float(hits / x) if x > 0 else 0.0 for x in (said_hits, true_hits))
    f1 = 2 * precision * recall / (precision + recall) if hits > 0 else 0.0
    accuracy = float((share * (said == true)).sum() / share.sum())
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def policy_cliff(
    rewards: Float[np.ndarray, "G"],
    *,
    alpha: float,
    delta: float = 0.01,
    direction: Float[np.ndarray, "G"] | None = None,
) -> dict[str, float]:
    """Whether a small change of a group's rewards changes which sample is preferred.

        pi_R proportional to exp(R / alpha),   flip = TV(pi_R, pi_{R + delta u}) <= delta |u|_inf / (2 alpha) = bound

    `ties` is the number of samples with the highest reward; `margin` is its distance to the next value (0 if all are
    equal). With a small alpha a tied group flips, and one whose margin exceeds the change does not.

    Args:
      rewards: of one group's samples.
      alpha: the KL coefficient, or temperature, in use.
      delta: size of the change.
      direction: u, such as another reward, length or format; None leaves out flip and bound.

    Raises:
      ValueError: for no rewards, an alpha that is not above 0, or a direction of another length.

    Reference: The policy cliff (2507.20150)
    Certainty: reconstructed
    """
    r = np.asarray(rewards, np.float64)
    if r.ndim != 1 or not len(r) or not alpha > 0:
        raise ValueError(f"rewards has the shape {r.shape} and alpha is {alpha}; give one group, and an alpha above 0")
    top = r >= r.max() - 1e-9
    found = {"ties": float(top.sum()), "margin": float(r.max() - r[~top].max()) if (~top).any() else 0.0}
    if direction is None:
        return found
    u = np.asarray(direction, np.float64)
    if u.shape != r.shape:
        raise ValueError(f"direction has the shape {u.shape} and rewards {r.shape}; give one number a sample")

    def tilted(values: np.ndarray) -> np.ndarray:
        weights = np.exp((values - values.max()) / alpha)
        return weights / weights.sum()

    flip = 0.5 * np.abs(tilted(r) - tilted(r + delta * u)).sum()
    return found | {"flip": float(flip), "bound": float(delta * np.abs(u).max() / (2 * alpha))}


def _two(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(f"shapes {a.shape} and {b.shape} must both be [P, G]: one row a prompt, one column a sample")
    return a, b


def _unit(values: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(values)
    return values / norm if norm > 1e-12 else np.zeros_like(values)
