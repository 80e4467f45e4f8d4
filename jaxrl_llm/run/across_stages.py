"""Continual evaluation: after each stage the policy is evaluated on the problems of all stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import PyTree

from jaxrl_llm.evaluation.comparison import continual
from jaxrl_llm.run.stages import Run, Stage

_KEPT = "across_stages"


def own_stages(stages: Sequence[Stage]) -> list[Stage]:
    """The evaluated stages: those of section `stages` with problems."""
    return [stage for stage in stages if stage.first_saved and stage.parts.config.has_problems]


def measure_across(
    run: Run, stages: Sequence[Stage], after: Stage, params: PyTree, measured: Callable[[Stage], Callable[..., Any]]
) -> None:
    """Record pass@1 on the validation problems of all stages after one of them; it is part of the next checkpoint."""
    rows = run.meta.setdefault(_KEPT, {})
    problems = run.config.evaluation.problems
    rows[after.name] = {
        one.name: measured(one)(params, "validation", problems, "evaluation across stages")["pass@1"]
        for one in own_stages(stages)
    }


def across_summary(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The matrix of accuracies with its forgetting measures; empty if it was not measured."""
    rows = meta.get(_KEPT)
    if not rows:
        return {}
    names = list(next(iter(rows.values())))
    matrix = [[rows[after][name] for name in names] for after in names if after in rows]
    whole = len(matrix) == len(names)
    return {_KEPT: {"accuracies": rows, **(continual(matrix) if whole else {})}}
