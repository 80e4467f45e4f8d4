"""The batches of a run's steps, and the graders of its evaluations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax

from jaxrl_llm import data
from jaxrl_llm.config import Config
from jaxrl_llm.data import Batches, DataSet, ProblemSet
from jaxrl_llm.data.buckets import buckets
from jaxrl_llm.data.tasks.items import record
from jaxrl_llm.evaluation import Grader, benchmark_grader, file_grader, function_grader, task_grader
from jaxrl_llm.evaluation.grading import require_columns
from jaxrl_llm.experience import Prompts
from jaxrl_llm.fields import PROMPT_COLUMNS
from jaxrl_llm.run.policy_parts import PolicyParts
from jaxrl_llm.run.recipes import user_function
from jaxrl_llm.run.setup import Parts


def prompts_handed(parts: Parts) -> int:
    """Number of prompts passed to a step: more than it trains on if the plan refills groups."""
    c = parts.step.composition
    return parts.config.training.prompts_per_step * (1 if c.rollout is None else c.plan.prompts_per_group)


def prompt_widths(config: Config) -> tuple[int, ...]:
    """Possible widths of the prompts of a step, in ascending order; each one that occurs needs its own program."""
    rollout = config.rollout
    if rollout.prompt_buckets is True:
        return buckets(rollout.max_prompt_tokens)
    return tuple(sorted({*(rollout.prompt_buckets or ()), rollout.max_prompt_tokens}))


def grader(parts: PolicyParts, *held_out: DataSet | ProblemSet) -> Grader:
    """The grader of evaluations for these sets.

    Raises:
      ValueError: if it cannot grade their reference answers.
    """
    config, records = parts.config, [each for split in held_out for each in split]
    if config.evaluation.grader is not None:
        return named_grader(config.evaluation.grader, records)
    if parts.task is not None:
        return task_grader(parts.task)
    if not config.data.sources:
        return file_grader(config.data.verifier, records)
    graders: dict[str, Grader] = {}
    for name, one in config.data.sources.items():
        own = [each for each in records if each["data_source"] == name]
        made = None if one.task is None else data.tasks.task(one.task.name, **one.task.options)
        graders[name] = file_grader(one.verifier, own) if made is None else task_grader(made)
    return lambda record, completion: graders[record["data_source"]](record, completion)


def named_grader(name: str, records: Sequence[Any]) -> Grader:
    """The grader of a name, or the user's at module:function.

    Raises:
      ValueError: for an unknown name, or records that it cannot grade.
    """
    items = [record(each, number) for number, each in enumerate(records)]
    if ":" not in name:
        return benchmark_grader(name, items)
    function = user_function(name, "grader")
    require_columns(function, items, name)
    return function_grader(function, name=name)


def prompt_batches(parts: Parts, source: Sequence[Any]) -> Batches:
    """Batches of training prompts, with reference completions if the step reads them; the index is the step."""
    config, rollout = parts.config, parts.config.rollout
    wanted = parts.step.composition.wanted
    with_demonstrations = bool(wanted & {"demonstration_tokens", "demonstration_length"})
    _check_ids(parts, source)
    if with_demonstrations and parts.task is not None and parts.task.segments is not None:
        raise ValueError(
            f"the recipe trains on reference completions, but those of task {parts.task.name!r} are conversations "
            "with observations; use warm_start, which masks observations, or a task with single completions"
        )
    return data.prompt_batches(
        source,
        parts.tokenizer,
        prompts_per_step=prompts_handed(parts),
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_answer_tokens=rollout.max_completion_tokens,
        seed=config.seed,
        overlong=config.data.overlong_prompts,
        max_demonstration_tokens=rollout.max_completion_tokens if with_demonstrations else None,
        scratchpad=parts.scratchpad,
        widths=prompt_widths(config),
        numbered=config.data.selection is not None,
        prompt_columns=prompt_columns(wanted),
    )


def prompt_columns(wanted: Collection[str]) -> tuple[str, ...]:
    """Columns of the data that a step reads as further forms of the prompt."""
    return tuple(name for name in PROMPT_COLUMNS if {f"{name}_tokens", f"{name}_length"} & set(wanted))


def _check_ids(parts: Parts, source: Sequence[Any]) -> None:
    """Raise ValueError if a prompt's id is too large for the memory of a plan."""
    rollout = parts.step.composition.rollout
    held = None if rollout is None else jax.eval_shape(parts.step.composition.plan.memory)
    room = getattr(getattr(held, "seen", None), "shape", None)
    if room is None:
        return
    largest = max(int(source[index]["item_id"]) for index in range(len(source)))
    if largest >= room[0]:
        raise ValueError(
            f"rollout.plan.budget.prompt_ids is {room[0]}, but a prompt has the id {largest}; set it to at least "
            f"{largest + 1}"
        )


def encoded(parts: Parts, source: Sequence[Any]) -> Prompts:
    """All prompts of a split, in order.

    Raises:
      ValueError: for a prompt that is too long, unless the config drops such prompts.
    """
    config = parts.config
    return data.encode_prompts(
        source,
        parts.tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_answer_tokens=config.rollout.max_completion_tokens,
        overlong=config.data.overlong_prompts,
    )


def demonstration_batches(parts: Parts, source: Sequence[Any], sequences_per_step: int) -> Batches:
    """Batches of reference completions."""
    config = parts.config
    return data.supervised_batches(
        source,
        parts.tokenizer,
        sequences_per_step=sequences_per_step,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        seed=config.seed,
        scratchpad=parts.scratchpad,
        overlong=config.data.overlong_prompts,
        segments=None if parts.task is None else parts.task.segments,
    )
