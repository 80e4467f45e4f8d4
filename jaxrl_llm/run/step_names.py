"""How messages name a step: by its number in its stage, and by that over all stages, which records have."""

from __future__ import annotations


def step_name(done: int, stage: str, before: int) -> str:
    """A step of a stage for messages, with its number in metrics.jsonl if earlier stages have steps.

    >>> step_name(1, "reinforcement", 70)
    'step 1 of the reinforcement (71 in metrics.jsonl)'

    >>> step_name(1, "warm start", 0)
    'step 1 of the warm start'
    """
    return f"step {done} of the {stage}" + (f" ({before + done} in metrics.jsonl)" if before else "")
