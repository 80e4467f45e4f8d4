"""What a policy still knows: after each stage it is measured on the problems of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import PyTree

from jaxrl_llm.evaluation.comparison import continual
from jaxrl_llm.run.stages import Run, Stage

_KEPT = "across_stages"


def own_stages(stages: Sequence[Stage]) -> list[Stage]:
    """The stages whose problems are measured: those of section `stages` that have some."""
    return [stage for stage in stages if stage.first_saved and stage.parts.config.has_problems]


def measure_across(
    run: Run, stages: Sequence[Stage], after: Stage, params: PyTree, measured: Callable[[Stage], Callable[..., Any]]
) -> None:
    """Note pass@1 on the validation problems of every stage, after one of them; it is part of the next checkpoint."""
    rows = run.meta.setdefault(_KEPT, {})
    problems = run.config.evaluation.problems
    rows[after.name] = {
        one.name: measured(one)(params, "validation", problems, "evaluation across stages")["pass@1"]
        for one in own_stages(stages)
    }


def across_summary(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The matrix of accuracies and what it says of forgetting; nothing where it was not measured."""
    rows = meta.get(_KEPT)
    if not rows:
        return {}
    names = list(next(iter(rows.values())))
    matrix = [[rows[after][name] for name in names] for after in names if after in rows]
    whole = len(matrix) == len(names)
    return {_KEPT: {"accuracies": rows, **(continual(matrix) if whole else {})}}
