"""Comparison of two evaluations of the same problems by paired differences, and forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.bounds import counted
from jaxrl_llm.evaluation.intervals import mean_intervals, sign_test
from jaxrl_llm.evaluation.measures import Record, Values, accuracies, reward_means, spread


def compared(first: Sequence[Record], second: Sequence[Record], k: Sequence[int] | None = None) -> dict[str, Any]:
    """Differences of the second evaluation from the first, problem by problem.

    The interval of a difference is narrower than those of its two sides if both fail on the same problems.

    Args:
      first, second: records of the same problems, in any order.
      k: of pass@k and maj@k; None: 1, 2, 4, ... up to the number of samples of both.

    Returns:
      `metrics`: name -> first, second, difference and its 95% `interval`; with `p` from an exact sign test of greedy
      and pass@1. The mean of a reward is included if both evaluations have it, over the problems on which it applies to
      at least one sample of each. `only_first`, `only_second`: problems that only one solves greedily. `problems`:
      their number.

    Raises:
      ValueError: for evaluations of other problems, naming one, or a k above the samples of one.
    """
    one, two = _paired(first, second)
    samples = min(len(record["samples"]) for record in (*one, *two))
    ks = [1 << power for power in range(samples.bit_length())] if k is None else list(k)
    names = ("completion_tokens", "truncated_share", "agreement", "distinct_answers", "answer_entropy")
    sides = []
    for records in (one, two):
        found = spread(records)
        sides.append(accuracies(records, ks) | {name: found[name] for name in names})
    metrics = _differences(*sides) | _reward_differences(one, two)
    for name in ("greedy", "pass@1"):
        if name in metrics:
            metrics[name]["p"] = sign_test(sides[0][name], sides[1][name])
    solved = [side["greedy"] > 0 for side in sides]
    return {
        "problems": len(one),
        "only_first": int((solved[0] & ~solved[1]).sum()),
        "only_second": int((solved[1] & ~solved[0]).sum()),
        "metrics": metrics,
    }


def _differences(one: Values, two: Values) -> dict[str, dict[str, Any]]:
    """Paired differences of each number of both evaluations, over the same problems."""
    names = [name for name in one if name in two]
    around = mean_intervals(np.stack([two[name] - one[name] for name in names], axis=1))
    return {
        name: {
            "first": float(one[name].mean()),
            "second": float(two[name].mean()),
            "difference": float((two[name] - one[name]).mean()),
            "interval": ends.tolist(),
        }
        for name, ends in zip(names, around, strict=True)
    }


def _reward_differences(one: Sequence[Record], two: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Paired differences of the means of common rewards, over the problems on which they apply in both."""
    first, second = (
        {name: of for name, of in reward_means(records, 1).items() if name.startswith("reward/")}
        for records in (one, two)
    )
    found = {}
    for name in (name for name in first if name in second):
        both = ~np.isnan(first[name] + second[name])
        if both.any():
            found |= _differences({name: first[name][both]}, {name: second[name][both]})
    return found


def forgetting(history: Sequence[Mapping[str, float]]) -> float:
    """Forgetting: the mean over tasks of the best earlier accuracy minus the last one.

        F = mean_t ( max_{i < last} accuracy_i(t) - accuracy_last(t) )

    Negative if all tasks improved on their best.

    >>> round(forgetting([{"a": 0.9, "b": 0.2}, {"a": 0.6, "b": 0.5}]), 6)
    0.0

    Args:
      history: accuracies by task for each checkpoint, in order; the same tasks in all.

    Raises:
      ValueError: for fewer than two checkpoints, or different tasks.

    Reference: Riemannian walk for incremental learning (1801.10112)
    Certainty: recalled
    """
    if len(history) < 2:
        held = counted(len(history), "checkpoint")
        raise ValueError(f"history has {held}; forgetting compares the last with those before it")
    tasks = history[-1].keys()
    if other := next((each for each in history if each.keys() != tasks), None):
        raise ValueError(f"one checkpoint has the tasks {sorted(other)} and the last {sorted(tasks)}; use the same")
    return float(np.mean([max(each[task] for each in history[:-1]) - history[-1][task] for task in tasks]))


def continual(history: Sequence[Sequence[float]]) -> dict[str, float]:
    """Continual-learning measures of a model trained on a sequence of tasks, from its matrix of accuracies.

        average            mean_j A[T][j]
        forgetting         mean_{j < T} (max_{i < T} A[i][j] - A[T][j])
        backward_transfer  mean_{j < T} (A[T][j] - A[j][j])

    >>> {name: round(value, 6) for name, value in continual([[.8, .1, 0], [.6, .9, .2], [.5, .7, .85]]).items()}
    {'average': 0.683333, 'forgetting': 0.25, 'backward_transfer': -0.25}

    Args:
      history: A[i][j], accuracy on task j after training on task i, in the order of training.

    Returns:
      The three by name; the last two are NaN for a single task.

    Raises:
      ValueError: unless the matrix is square and not empty.

    Reference: RIF-RFT (2507.05386).
    Certainty: verified
    """
    found = np.asarray(history, float)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not found.size:
        raise ValueError(f"history has the shape {found.shape}; give the accuracy on every task after every task")
    last, earlier = found[-1], found[:-1, :-1]
    if len(found) == 1:
        return {"average": float(last.mean()), "forgetting": float("nan"), "backward_transfer": float("nan")}
    return {
        "average": float(last.mean()),
        "forgetting": float((earlier.max(axis=0) - last[:-1]).mean()),
        "backward_transfer": float((last[:-1] - np.diag(found)[:-1]).mean()),
    }


def _paired(first: Sequence[Record], second: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The records of both in the order of the first."""
    other = {record["item_id"]: record for record in second}
    if len(first) != len(second):
        raise ValueError(
            f"the evaluations have {len(first)} and {counted(len(second), 'problem')} and cannot be compared; "
            "evaluate both on the same problems (the same --data or --split, and --problems)"
        )
    for record in first:
        same = other.get(record["item_id"])
        if same is None or same["prompt"] != record["prompt"]:
            said = "is missing" if same is None else f"is {same['prompt'][:60]!r}"
            raise ValueError(
                f"item {record['item_id']} is {record['prompt'][:60]!r} in the first evaluation and {said} in the "
                "second, so they cannot be compared; evaluate both on the same problems"
            )
    return list(first), [other[record["item_id"]] for record in first]
