"""The curves of a report: metrics by step, smoothed within each stage, pass@k by k, and the reward against the KL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from jaxrl_llm.reporting.metric_table import described
from jaxrl_llm.reporting.reported_run import ReportedRun

MOST_POINTS = 2000  # of a curve; longer curves are averaged over neighbouring steps
SMOOTHING = 0.8  # the weight at which a report opens


def stages(run: ReportedRun, *, from_last_stage: bool = False) -> list[dict[str, Any]]:
    """The first step of each stage, with its name; with `from_last_stage` the last one starts at step 1."""
    first: dict[str, int] = {}
    for record in run.metrics:
        first.setdefault(record.get("stage", ""), record["step"])
    before = list(first.values())[-1] - 1 if from_last_stage and first else 0
    return [{"name": name, "step": step - before} for name, step in first.items()]


def series(run: ReportedRun, *, from_last_stage: bool = False) -> dict[str, list[list[float | None]]]:
    """[steps, values] of each metric; long ones are averaged over neighbouring steps, and values not finite are None.

    Steps count over all stages. With `from_last_stage` the last stage starts at step 1 and steps before it are 0 and
    below, since warm starts of seeds may differ in length.
    """
    found: dict[str, tuple[list, list]] = {}
    starts = [stage["step"] for stage in stages(run)]
    before = starts[-1] - 1 if from_last_stage and starts else 0
    for record in run.metrics:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = found.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value if math.isfinite(value) else None)
    thinned = {name: _thinned(*pair, starts) for name, pair in found.items()}
    return {name: [[step - before for step in steps], values] for name, (steps, values) in thinned.items()}


def _thinned(steps: list[int], values: list[float | None], starts: Sequence[int]) -> tuple[list[int], list[Any]]:
    if len(steps) > MOST_POINTS:
        known = np.asarray([math.nan if value is None else value for value in values])
        parts = []
        for piece in pieces(steps, starts):
            places = np.arange(len(steps))[piece]
            parts += np.array_split(places, max(1, round(MOST_POINTS * len(places) / len(steps))))
        values = [None if np.isnan(known[part]).all() else float(np.nanmean(known[part])) for part in parts]
        steps = [steps[part[-1]] for part in parts]
    return steps, [None if value is None else float(f"{value:.6g}") for value in values]


def pieces(steps: Sequence[int] | np.ndarray, starts: Sequence[int]) -> list[slice]:
    """The part of ascending steps in each stage, without those that are empty.

    >>> pieces([1, 2, 3, 4], [1, 3])
    [slice(0, 2, None), slice(2, 4, None)]
    """
    borders = [0, *(int(place) for place in np.searchsorted(steps, starts)), len(steps)]
    return [slice(a, b) for a, b in pairwise(borders) if a < b]


def spacing(run: ReportedRun) -> float:
    """Steps between the points of the run's densest curves."""
    return max(1.0, len(run.metrics) / MOST_POINTS)


def smoothing_of(name: str) -> float:
    """The weight at which a metric is smoothed: 0 for one that is set or counted, not measured with noise."""
    row = described(name)
    return 0.0 if row is not None and row.exact else SMOOTHING


def smoothed(
    steps: Sequence[float], values: Sequence[float | None], weight: float = SMOOTHING, spacing: float = 1.0
) -> np.ndarray:
    """Exponential moving average by step, debiased at the start; None stays a gap.

        y_t = sum_s w^((t - s) / spacing) x_s / sum_s w^((t - s) / spacing),   s <= t

    Since the weight counts by step, curves with few points are smoothed as others are: one that is measured at every
    20th step hardly changes.
    """
    numbers = np.asarray(values, float)
    total = mass = last = 0.0
    for place in np.flatnonzero(~np.isnan(numbers)).tolist():
        kept = weight ** ((steps[place] - last) / spacing) if mass else 0.0
        total, mass, last = kept * total + numbers[place], kept * mass + 1.0, steps[place]
        numbers[place] = total / mass
    return numbers


def pass_curves(runs: Sequence[ReportedRun], groups: Sequence[str]) -> list[dict[str, Any]]:
    """pass@k by k before and after training: of a single run with 95% intervals, and of seeds the mean, with a band
    from the lowest to the highest."""
    from jaxrl_llm.evaluation.measures import measured

    found = []
    for group, members in _members(runs, groups):
        for when in ("before", "after"):
            curves = [measured(run.evaluations[when], (1,))["pass_at_k"] for run in members if when in run.evaluations]
            k = [name for name in curves[0] if all(name in curve for curve in curves)] if curves else []
            if not k:
                continue
            means = np.array([[curve[name]["mean"] for name in k] for curve in curves])
            low, high = means.min(0), means.max(0)
            if len(members) == 1:
                low, high = np.array([curves[0][name]["interval"] for name in k]).T
            values = {"mean": means.mean(0), "low": low, "high": high}
            found.append(
                {"name": f"{group}, {when}", "k": [int(name) for name in k]}
                | {name: each.tolist() for name, each in values.items()}
            )
    return found


def kl_curves(runs: Sequence[ReportedRun], groups: Sequence[str]) -> list[dict[str, Any]]:
    """Reward, share of correct samples and validation accuracy against the KL divergence from the reference, for each
    stage; of seeds, both are means over the seeds at a step.

    If accuracy falls while the reward still rises, the policy has begun to exploit its reward.
    """
    found, kl = [], "kl_reference_per_token"
    for group, members in _members(runs, groups):
        for name in ("reward", "correct_share", "validation/pass@1"):
            by_stage: dict[str, dict[int, list[tuple[float, float]]]] = {}
            for run in members:
                before = stages(run, from_last_stage=len(members) > 1)[0]["step"] - run.metrics[0]["step"]
                for record in run.metrics:
                    if math.isfinite(record.get(kl, math.nan)) and math.isfinite(record.get(name, math.nan)):
                        own = by_stage.setdefault(record.get("stage", ""), {})
                        own.setdefault(record["step"] + before, []).append((record[kl], record[name]))
            curves = {stage: _of_all(points, len(members)) for stage, points in by_stage.items()}
            curves = {stage: curve for stage, curve in curves.items() if len(curve["step"]) > 1}
            for stage, curve in curves.items():
                of_stage = [stage] * (len(curves) > 1)
                found.append({"name": ", ".join([group, name, *of_stage])} | curve)
    return found


def _of_all(points: dict[int, list[tuple[float, float]]], members: int) -> dict[str, Any]:
    """The curve of the means at the steps that all members have, with at most `MOST_POINTS` points."""
    steps = sorted(step for step, pairs in points.items() if len(pairs) == members)
    apart = max(1.0, len(steps) / MOST_POINTS)
    kept = [steps[place] for place in np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).round().astype(int)]
    x, y = ([float(np.mean([pair[i] for pair in points[step]])) for step in kept] for i in (0, 1))
    return {"step": kept, "kl": x, "value": y, "spacing": apart}


def _members(runs: Sequence[ReportedRun], groups: Sequence[str]) -> Iterator[tuple[str, list[ReportedRun]]]:
    for group in dict.fromkeys(groups):
        yield group, [run for run, own in zip(runs, groups, strict=True) if own == group]
