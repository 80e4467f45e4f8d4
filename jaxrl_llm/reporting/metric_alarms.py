"""What in a run's metrics deserves a look: each alarm is a sentence with the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]


def alarms(records: Records) -> list[str]:
    """Sentences about metrics that look wrong, over the records of a metrics.jsonl.

    Looked at are: numbers that are not finite, groups without signal, completions that are cut off, entropy that
    collapses, gradients that jump, a KL divergence that runs away, a reward that falls, and a sampler that disagrees
    with the trainer. The last tenth of the steps is compared with the first, or with a bound.
    """
    series = _series(records)
    found = [
        f"{name} was not finite at step {int(steps[~np.isfinite(values)][0])}"
        for name, (steps, values) in series.items()
        if not np.isfinite(values).all()
    ]
    ends = {name: _ends(values) for name, (_, values) in series.items() if np.isfinite(values).all()}

    def last(name: str) -> float:
        return ends.get(name, (0.0, 0.0))[1]

    if last("constant_group_share") > 0.8:
        found.append(
            f"{last('constant_group_share'):.0%} of the groups had equal rewards in the last tenth of the steps, and "
            "taught nothing: take harder or easier prompts, or rollout.plan refill"
        )
    if last("truncated_share") > 0.2:
        found.append(
            f"{last('truncated_share'):.0%} of the completions were cut off at the end: raise "
            "rollout.max_completion_tokens, or use a length method"
        )
    if "entropy_per_token" in ends and ends["entropy_per_token"][0] > 0:
        first, now = ends["entropy_per_token"]
        if now < 0.1 * first:
            found.append(
                f"entropy a token fell from {first:.3g} to {now:.3g} nats: samples hardly differ any more; raise "
                "clip_high, or add an entropy bonus"
            )
    if (kl := last("kl_reference_per_token")) > 1.0:
        found.append(f"KL from the reference is {kl:.3g} nats a token: raise its coefficient, or refresh the reference")
    if "reward" in ends and ends["reward"][1] < ends["reward"][0] - max(0.05, 0.1 * abs(ends["reward"][0])):
        found.append(
            f"the reward fell from {ends['reward'][0]:.3g} to {ends['reward'][1]:.3g}: lower the learning rate"
        )
    if "gradient_norm" in ends and len(series["gradient_norm"][1]) >= 20:
        steps, values = series["gradient_norm"]
        half = len(values) // 2
        typical, worst = float(np.median(values[half:])), half + int(np.argmax(values[half:]))
        if values[worst] > 10 * max(typical, 1e-12):
            found.append(
                f"the gradient norm jumped to {values[worst]:.3g} at step {int(steps[worst])}, from a median of "
                f"{typical:.3g}: clip it lower (training.max_gradient_norm)"
            )
    if "sampler_gap_max" in series and (gap := float(np.nanmax(series["sampler_gap_max"][1]))) > 0.05:
        found.append(
            f"sampler and trainer differed by up to {gap:.3g} in the log-probability of a token: use the same dtype in "
            "both, or a correction such as tis"
        )
    return found


def _series(records: Records) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, values) of each metric of the last stage that has it."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    stage = records[-1].get("stage") if records else None
    for record in records:
        if record.get("stage") != stage:
            continue
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = found.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return {name: (np.asarray(steps), np.asarray(values, np.float64)) for name, (steps, values) in found.items()}


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Mean of the first and of the last tenth."""
    count = max(1, len(values) // 10)
    return float(values[:count].mean()), float(values[-count:].mean())
