"""Which checkpoints stay: the newest, some for ever, and the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

METRIC = "metric"  # what a checkpoint is saved with, for the best to be chosen by


def preserved(keep: int, keep_every_steps: int | None, keep_best: int, best_is: str) -> policy.PreservationPolicy:
    """The policy of `checkpoints.checkpoint_manager`, whose arguments these are."""
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
    """Keeps steps that are multiples of a number, whichever steps there are between (orbax's `EveryNSteps` keeps those
    that are so far apart)."""

    def __init__(self, every: int):
        self.every = every

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step % self.every == 0 for checkpoint in checkpoints]
