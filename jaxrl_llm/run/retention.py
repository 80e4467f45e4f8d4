"""Which checkpoints are kept: the newest, multiples of a number of steps, and the best by a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

METRIC = "metric"  # name of the stored metric by which the best checkpoints are chosen


def preserved(keep: int, keep_every_steps: int | None, keep_best: int, best_is: str) -> policy.PreservationPolicy:
    """The preservation policy of `checkpoints.checkpoint_manager`, which documents these arguments."""
    policies: list[Any] = [policy.LatestN(keep)]
    if keep_every_steps:
        policies.append(_Multiples(keep_every_steps))
    if keep_best:
        policies.append(
            policy.BestN(
                get_metric_fn=lambda metrics: metrics[METRIC],
                reverse=best_is == "lowest",
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return policy.AnyPreservationPolicy(policies)


class _Multiples:
    """Keeps the steps that are multiples of a number.

    The `EveryNSteps` of orbax keeps steps that are at least this far apart, which need not be multiples.
    """

    def __init__(self, every: int):
        self.every = every

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step % self.every == 0 for checkpoint in checkpoints]
