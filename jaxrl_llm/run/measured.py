"""Evaluation of the policy of a run on the problems of its last stage, or of any stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxrl_llm.evaluation import Grader, make_evaluate
from jaxrl_llm.evaluation.record_files import fresh_records
from jaxrl_llm.experience import KeyUse
from jaxrl_llm.parallel import hosts
from jaxrl_llm.run.batches import grader
from jaxrl_llm.run.evaluation_batch import evaluation_batch
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.run.stages import Run, Stage, spread


def measured_by(
    run: Run, parts: Parts, grade: Grader | None, key: Any, sets: Mapping[str, Any] | None = None
) -> Callable[..., dict[str, float]]:
    """(params, split, problems, category of the time) -> accuracies; empty without problems.

    The problems are those of the run's evaluation, or `sets`.
    """
    config, place = run.config, parts.step.composition.resources.placement
    if grade is None:
        return lambda params, split, problems, what: {}
    by = "data_source" if parts.config.data.sources else None
    evaluate = make_evaluate(
        parts.model,
        grade,
        parts.tokenizer,
        samples_per_problem=config.evaluation.samples_per_problem,
        k=config.evaluation.k,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        sequences_per_batch=evaluation_batch(config, parts.model, place.mesh, place.rules),
        temperature=config.evaluation.temperature,
        overlong=config.data.overlong_prompts,
        mesh=place.mesh,
        rules=place.rules,
        gather=place.gather_for_rollout,
        environment=parts.environment,
        call=run.parts.call,
        columns=("data_source",) if by is not None else ("level",) if parts.task is not None else (),
        by=by,
    )

    def measure(params: Any, split: str, problems: int, what: str) -> dict[str, float]:
        with run.timed(what):
            data = (run.data if sets is None else sets)[split]
            items = [data[i] for i in spread(len(data), problems)]
            write = None
            if split == "test" and hosts.is_main():  # before and after, for the report and `jaxrl compare`
                write = fresh_records(run.config.directory / "evaluations" / what.rpartition(" ")[2])
            heard = run.interruption.hearing(write, during=what == "evaluation during")
            return evaluate(params, items, jax.random.fold_in(key, KeyUse.EVALUATE), heard)

    return measure


def measured_on(run: Run, key: Any, stage: Stage) -> Callable[..., dict[str, float]]:
    """`measured_by` on the problems of a stage."""
    data = run.sets[stage.name]
    return measured_by(run, stage.parts, grader(stage.parts, data["validation"]), key, data)
