"""Metrics of an evaluation from its records, one per problem with all of its samples.

A record is a line of problems.jsonl:

    {"item_id": 0, "prompt": ..., "answer": ..., "columns": {"level": 2},
     "greedy": {"completion": ..., "correct": true, "answer": ..., "tokens": 12, "truncated": false, "logprob": -3.1},
     "samples": [{...}, ...]}

A sample may also have `score`, `confidence`, `reference_logprob` and `rewards`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.evaluation.best_of_n import best_of_n_accuracy
from jaxrl_llm.evaluation.diversity import answer_entropy, distinct_ngrams, distinct_share
from jaxrl_llm.evaluation.intervals import mean_intervals
from jaxrl_llm.evaluation.pass_rates import pass_at_k
from jaxrl_llm.evaluation.reliability import (
    accuracy_at_coverage,
    auroc,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from jaxrl_llm.evaluation.voting import agreement, majority_at_k, vote_reward_accuracy, weighted_vote

Record = Mapping[str, Any]
Values = dict[str, np.ndarray]


def accuracies(records: Sequence[Record], k: Sequence[int]) -> Values:
    """`greedy`, `pass@k` and `maj@k` (k > 1) of each problem, one number per record.

    In a majority vote samples with the same answer form a class; all right answers are one class.
    """
    samples = [record["samples"] for record in records]
    correct = np.asarray([sum(each["correct"] for each in row) for row in samples])
    drawn = np.asarray([len(row) for row in samples])
    found = {"greedy": np.asarray([float(record["greedy"]["correct"]) for record in records])}
    found |= {f"pass@{each}": pass_at_k(correct, drawn, each) for each in k}
    votes, gold = _votes(records)
    return found | {f"maj@{each}": majority_at_k(votes, gold, each) for each in k if each > 1}


def votes_by_weight(records: Sequence[Record], k: int) -> Values:
    """`weighted@n`: accuracy of the vote of all samples, weighted by likelihood per token (or stated confidence);
    `best@k`: accuracy of the sample of k with the highest likelihood per token; `vote_reward_accuracy@n`: share of the
    samples that a majority-vote reward would judge correctly."""
    found: Values = {f"vote_reward_accuracy@{len(records[0]['samples'])}": vote_reward_accuracy(*_votes(records))}
    for name, weights in _confidences(records).items():
        if any(None in row for row in weights):
            continue
        label = "" if name == "likelihood" else f"_{name}"
        votes, gold = _votes(records)
        won = [weighted_vote(row, weight) == g for row, weight, g in zip(votes, weights, gold, strict=True)]
        found[f"weighted{label}@{len(votes[0])}"] = np.asarray(won, np.float64)
        found[f"best{label}@{k}"] = _best(records, weights, k)
    return found


def reward_means(records: Sequence[Record], k: int) -> Values:
    """For every reward of the samples: its mean, and the accuracy of the best of k samples by this reward.

    Samples to which a reward does not apply are left out of the mean, and rank last among the best of k.
    """
    found: Values = {}
    known = [each.get("rewards", {}).keys() for record in records for each in record["samples"]]
    for name in (each for each in known[0] if all(each in names for names in known)):
        values = [[each["rewards"][name] for each in record["samples"]] for record in records]
        found[f"reward/{name}"] = np.asarray([_mean([v for v in row if v is not None]) for row in values])
        lowest = min((v for row in values for v in row if v is not None), default=0.0) - 1.0
        found[f"best_by_{name}@{k}"] = _best(records, [[lowest if v is None else v for v in row] for row in values], k)
    return found


def spread(records: Sequence[Record]) -> Values:
    """Agreement, diversity and lengths of the samples of each problem."""
    samples = [record["samples"] for record in records]
    answers = [[each["answer"] for each in row] for row in samples]
    texts = [[each["completion"] for each in row] for row in samples]
    found = {
        "agreement": agreement(answers),
        "distinct_answers": np.asarray([float(len({a for a in row if a is not None})) for row in answers]),
        "answer_entropy": np.asarray([answer_entropy(row) for row in answers]),
        "no_answer_share": np.asarray([_mean([a is None for a in row]) for row in answers]),
        "distinct_completions_share": np.asarray([distinct_share(row) for row in texts]),
        "distinct_4grams_share": np.asarray([distinct_ngrams(row) for row in texts]),
        "completion_tokens": np.asarray([_mean([each["tokens"] for each in row]) for row in samples]),
        "truncated_share": np.asarray([_mean([each["truncated"] for each in row]) for row in samples]),
        "negative_logprob": np.asarray([-_mean([each["logprob"] for each in row]) for row in samples]),
    }
    if any("score" in each for row in samples for each in row):
        found["score"] = np.asarray([_mean([each.get("score", each["correct"]) for each in row]) for row in samples])
    if "reference_logprob" in samples[0][0]:
        # An estimate of KL(policy || reference) of whole completions, on samples of the policy.
        gaps = [[each["logprob"] - each["reference_logprob"] for each in row] for row in samples]
        found["kl_reference"] = np.asarray([_mean(row) for row in gaps])
    return found


def lengths(records: Sequence[Record]) -> dict[str, float | None]:
    """Tokens of the sampled completions: mean, quantiles, and means of right and wrong ones."""
    every = [each for record in records for each in record["samples"]]
    tokens = np.asarray([each["tokens"] for each in every], np.float64)
    right = np.asarray([bool(each["correct"]) for each in every])
    found = {"mean": float(tokens.mean())}
    found |= {f"quantile_{q}": float(np.quantile(tokens, q)) for q in (0.1, 0.5, 0.9, 1.0)}
    parts = {"of_right": tokens[right], "of_wrong": tokens[~right]}
    return found | {name: float(part.mean()) if len(part) else None for name, part in parts.items()}


def calibration(records: Sequence[Record], *, bins: int = 10) -> dict[str, dict[str, Any]]:
    """Calibration of each kind of confidence of the samples.

    `likelihood` is exp(mean log-probability per token), `agreement` the share of a problem's samples with the same
    answer, `stated` the confidence that a grader read from the text. Samples without one are left out and counted.
    """
    right = [bool(each["correct"]) for record in records for each in record["samples"]]
    found = {}
    for name, rows in (_confidences(records) | {"agreement": _shares(records)}).items():
        values = [value for row in rows for value in row]
        kept = [i for i, value in enumerate(values) if value is not None]
        if not kept:
            continue
        c, y = np.asarray([values[i] for i in kept], np.float64), np.asarray([right[i] for i in kept])
        separation = auroc(c, y)
        found[name] = {
            "missing_share": 1 - len(kept) / len(values),
            "ece": expected_calibration_error(c, y, bins=bins),
            "brier": brier_score(c, y),
            "auroc": None if math.isnan(separation) else separation,
            "accuracy_of_most_confident_half": accuracy_at_coverage(c, y, coverage=0.5),
            "reliability": [
                {"count": b.count, "confidence": b.confidence, "accuracy": b.accuracy}
                for b in reliability_curve(c, y, bins=bins)
                if b.count
            ],
        }
    return found


def measured(records: Sequence[Record], k: Sequence[int], *, by: Sequence[str] = ()) -> dict[str, Any]:
    """All numbers of an evaluation, as plain data.

    Args:
      records: one per problem, each with the same number of samples.
      k: of pass@k, maj@k and best-of-k.
      by: columns of the records; accuracies are reported for each of their values.

    Returns:
      Means over problems by name; `intervals` with their 95% bootstrap intervals; `pass_at_k` for all k with intervals;
      `calibration`, `lengths` and `by`.

    Raises:
      ValueError: for no records, a k above the number of samples, or an unknown column.
    """
    if not records:
        raise ValueError("there are no records to measure; evaluate at least one problem")
    of_each = (
        accuracies(records, k) | votes_by_weight(records, max(k)) | reward_means(records, max(k)) | spread(records)
    )
    samples = len(records[0]["samples"])
    correct = np.asarray([sum(each["correct"] for each in record["samples"]) for record in records])
    spectrum = {str(each): pass_at_k(correct, samples, each) for each in range(1, samples + 1)}
    metrics, intervals = _means(of_each)
    curve, around = _means(spectrum)
    return metrics | {
        "problems": len(records),
        "samples_per_problem": samples,
        **episode_means(records),
        "intervals": intervals,
        "pass_at_k": {each: {"mean": curve[each], "interval": around[each]} for each in spectrum},
        "calibration": calibration(records),
        "lengths": lengths(records),
        "by": {column: _broken_down(records, column, k) for column in by},
    }


def episode_means(records: Sequence[Record]) -> dict[str, float]:
    """Means of environments' metrics over the episodes that have them; a metric that no episode has is left out."""
    names = dict.fromkeys(name for record in records for name in record.get("episodes", {}))
    pairs = {name: np.sum([record["episodes"][name] for record in records], axis=0) for name in names}
    return {name: float(total / count) for name, (total, count) in pairs.items() if count}


def column_values(records: Sequence[Record], column: str) -> list[Any]:
    """The value of a column of each record.

    Raises:
      ValueError: for a column that a record does not have.
    """
    for record in records:
        if column not in record["columns"]:
            known = ", ".join(record["columns"]) or "none"
            raise ValueError(f"there is no column {column!r} in item {record['item_id']}; its columns are {known}")
    return [record["columns"][column] for record in records]


def _broken_down(records: Sequence[Record], column: str, k: Sequence[int]) -> dict[str, dict[str, Any]]:
    values = column_values(records, column)
    found = {}
    for value in sorted(set(values), key=lambda each: (isinstance(each, str), each)):
        part = [record for record, own in zip(records, values, strict=True) if own == value]
        of_each = accuracies(part, k) | {name: v for name, v in spread(part).items() if name == "completion_tokens"}
        means, intervals = _means(of_each)
        found[str(value)] = {"problems": len(part)} | means | {"intervals": intervals}
    return found


def _means(values: Values) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Mean of each number over problems, without those to which it does not apply (NaN), and its interval."""
    means, intervals = {}, {}
    whole = {name: column for name, column in values.items() if not np.isnan(column).any()}
    around = mean_intervals(np.stack(list(whole.values()), axis=1)) if whole else np.zeros((0, 2))
    for name, ends in zip(whole, around, strict=True):
        means[name], intervals[name] = float(np.mean(whole[name])), ends.tolist()
    for name, column in values.items():
        if name not in whole and len(kept := column[~np.isnan(column)]):
            means[name] = float(np.mean(kept))
            intervals[name] = mean_intervals(kept[:, None])[0].tolist()
    return {n: means[n] for n in values if n in means}, {n: intervals[n] for n in values if n in intervals}


def _votes(records: Sequence[Record]) -> tuple[list[list[str | None]], list[str]]:
    """The votes of the samples, and the right vote. A right answer votes for the reference answer."""
    gold = [record["answer"] or "right" for record in records]
    return [[each["answer"] for each in record["samples"]] for record in records], gold


def _confidences(records: Sequence[Record]) -> dict[str, list[list[float | None]]]:
    """Confidences of the samples by kind."""

    def each(read: Callable[[Record], float | None]) -> list[list[float | None]]:
        return [[read(sample) for sample in record["samples"]] for record in records]

    found = {"likelihood": each(lambda sample: math.exp(sample["logprob"] / max(sample["tokens"], 1)))}
    if any("confidence" in sample for record in records for sample in record["samples"]):
        found["stated"] = each(lambda sample: sample.get("confidence"))
    return found


def _shares(records: Sequence[Record]) -> list[list[float | None]]:
    """For each sample, the share of the problem's samples with the same answer; None without an answer."""
    rows = [[sample["answer"] for sample in record["samples"]] for record in records]
    return [[None if a is None else row.count(a) / len(row) for a in row] for row in rows]


def _best(records: Sequence[Record], scores: Sequence[Sequence[Any]], k: int) -> np.ndarray:
    right = [[float(each["correct"]) for each in record["samples"]] for record in records]
    return np.asarray([best_of_n_accuracy(row, correct, k) for row, correct in zip(scores, right, strict=True)])


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
