"""The sources of the rows of a step: one function for each name that section `source` accepts.

    source: sampler                                                   the policy samples completions (the default)
    source: [sampler, {replay: {share: 0.4}}]                         and rows of earlier steps are used again
    source: [sampler, {demonstrations: {sequences_per_step: 64}}]     and reference completions
    source: [sampler, {hardest: {sequences_per_pass: 32}}]            and those of prompts that no sample solved
    source: {pairs: {file: pairs.jsonl, groups_per_step: 32}}         all rows are read from a file

A keyword with the name of a size of the run gets that size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxrl_llm.data import Tokenizer
from jaxrl_llm.data.judged_rows import QUESTION, VERDICT, Asked, Kind
from jaxrl_llm.data.stored_reference import NAME as STORED
from jaxrl_llm.data.top_tokens import likely_batches, likely_rows, most_likely
from jaxrl_llm.data.written import PROVIDES, judged_groups, written_batches
from jaxrl_llm.experience import Experience
from jaxrl_llm.ranges import Count, Natural, OpenShare, Range, ranged
from jaxrl_llm.rows import Hardest, Replay, Written, written_rows


class Feed(NamedTuple):
    """A source, and how a run provides its rows.

    Attributes:
      source: the source in the composition of the step; None for the sampler.
      rows: (parts of the run, data of the stage) -> function from step to rows; None if the host provides no rows.
      stored: arguments of `stored_answers`, whose answers are sampled before the stage; None without stored answers.
      file: hash of the file that the rows are read from; None if the rows are made from the problems of the data.
      dropped: number of rows of the file that were dropped, by reason.
    """

    source: Written | Replay | Hardest | None = None
    rows: Callable[[Any, Mapping[str, Any]], Callable[[int], Experience]] | None = None
    stored: Any = None
    file: str | None = None
    dropped: Mapping[str, int] = {}


Unusable = Literal["error", "drop"]


def sampler() -> Feed:
    """The policy samples completions of the prompts of the data."""
    return Feed()


@ranged
def replay(
    *,
    share: OpenShare,
    prompts_per_step: Count,
    max_prompt_tokens: Count,
    max_completion_tokens: Count,
    batches: Count = 2,
    until_step: Natural | None = None,
) -> Feed:
    """Rows of the last `batches` steps are used again; a share `share` of the groups of a batch is replayed."""
    return Feed(Replay(share, batches, prompts_per_step, max_prompt_tokens, max_completion_tokens, until_step))


@ranged
def demonstrations(
    *, sequences_per_step: Count, samples_per_prompt: Count, beside: bool, validation: bool = False
) -> Feed:
    """Reference completions of the data.

    Args:
      sequences_per_step: demonstrations of a step; with samples in the batch, a multiple of samples_per_prompt.
      samples_per_prompt: rows of a group.
      beside: the batch also has samples, and `written_mask` marks the demonstrations; otherwise it has no other rows.
      validation: add as many rows of the validation split, with `validation` 1 and weight 0.
    """
    group = samples_per_prompt if beside else 1
    _check_multiple("demonstrations", sequences_per_step, group)
    provides = frozenset({"turn"} if not beside else set()) | ({"validation"} if validation else frozenset())
    count = sequences_per_step * (2 if validation else 1)

    def rows(parts: Any, sets: Mapping[str, Any]) -> Callable[[int], Experience]:
        from jaxrl_llm.rows import demonstrations as reference_rows
        from jaxrl_llm.run.batches import demonstration_batches

        splits = ("train", "validation") if validation else ("train",)
        batches = [demonstration_batches(parts, sets[split], sequences_per_step) for split in splits]
        if not beside:
            return lambda step: reference_rows(batches[0][step])
        width = parts.config.rollout.max_completion_tokens
        return lambda step: _beside([b[step] for b in batches], width, marked=validation)

    return Feed(Written(count, group, provides), rows)


def _beside(parts: Sequence[Any], width: int, *, marked: bool) -> Experience:
    """Rows of reference completions to append to samples; those of the second part are validation rows of weight 0."""
    names = ("prompt_tokens", "prompt_length", "prompt_id", "tokens", "length")
    arrays = [jnp.concatenate([getattr(part, name) for part in parts]) for name in names]
    trained = jnp.concatenate([jnp.asarray(part.mask) for part in parts])
    held_out = jnp.repeat(jnp.arange(len(parts), dtype=jnp.float32), arrays[-1].shape[0] // len(parts))
    rows = replace(written_rows(*arrays, answer_width=width, trained=trained), weight=1.0 - held_out)
    return rows.filled(validation=held_out) if marked else rows


@ranged
def hardest(
    *,
    sequences_per_pass: Count,
    samples_per_prompt: Count,
    max_prompt_tokens: Count,
    max_completion_tokens: Count,
    capacity: Count | None = None,
) -> Feed:
    """Reference completions of prompts that no sample solved, kept in a queue until there are enough for a step.

    Args:
      sequences_per_pass: demonstrations that are added to the samples of a step once the queue has so many, newest
        first; a multiple of samples_per_prompt. Their loss reads `written_mask`.
      samples_per_prompt: rows of a group.
      max_prompt_tokens, max_completion_tokens: of the run.
      capacity: longest queue; None is 4 * sequences_per_pass.
    """
    room = 4 * sequences_per_pass if capacity is None else capacity
    return Feed(Hardest(sequences_per_pass, room, samples_per_prompt, max_prompt_tokens, max_completion_tokens))


@ranged
def solved_answers(
    *, sequences_per_step: Count, samples_per_prompt: Count, attempts: Count = 4, min_correct: Count = 4
) -> Feed:
    """Stored answers of the initial policy to the prompts that it solves; training samples only the other prompts.

    Args:
      sequences_per_step: stored answers that are added to the samples of a step, a multiple of samples_per_prompt.
      samples_per_prompt: rows of a group.
      attempts: answers sampled for each training prompt before the stage.
      min_correct: correct answers among them that count a prompt as solved.

    Raises:
      ValueError: if min_correct is above attempts, or samples_per_prompt does not divide sequences_per_step.
    """
    for name, value in (("attempts", attempts), ("min_correct", min_correct)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if min_correct > attempts:
        raise ValueError(f"min_correct is {min_correct}, more than attempts {attempts}; lower it")
    _check_multiple("solved_answers", sequences_per_step, samples_per_prompt)
    source = Written(sequences_per_step, samples_per_prompt, frozenset({"stored_logprobs"}))
    return Feed(source, None, {"attempts": attempts, "min_correct": min_correct})


def _check_multiple(name: str, count: int, group: int, key: str = "sequences_per_step") -> None:
    if count < 1 or count % group:
        raise ValueError(
            f"source.{name}.{key} is {count}, which rollout.samples_per_prompt {group} does not divide; "
            "written rows are placed in groups of that size, so set a multiple"
        )


def _judged(
    kind: Kind,
    file: str | None,
    columns: Mapping[str, str] | None,
    groups_per_step: int,
    beside: bool,
    sizes: Mapping[str, Any],
    *,
    unusable: Literal["error", "drop"] = "error",
    flipped: float = 0.0,
    **asked: Any,
) -> Feed:
    if file is None:
        raise ValueError(f"source.{kind}.file is missing; name the data set there, or in data.path")
    groups, digest, dropped = judged_groups(file, kind, columns, asked=Asked(**asked), unusable=unusable)
    per_group = len(groups[0])
    count, samples = groups_per_step * per_group, sizes["samples_per_prompt"]
    if beside and per_group > 1 and per_group != samples:
        raise ValueError(
            f"source.{kind} has groups of {per_group} completions, but the samples in the same batch have groups of "
            f"rollout.samples_per_prompt {samples}; set that to {per_group}, or use the file in a separate stage"
        )
    if beside:  # single completions are collected into groups of that size
        _check_multiple(kind, count, samples, "groups_per_step")
        per_group = samples
    tokenizer: Tokenizer = sizes["tokenizer"]
    batches = written_batches(
        groups,
        kind,
        tokenizer,
        groups_per_step=groups_per_step,
        max_prompt_tokens=sizes["max_prompt_tokens"],
        max_completion_tokens=sizes["max_completion_tokens"],
        seed=sizes["seed"],
        overlong=sizes["overlong_prompts"],
        flipped=flipped,
    )

    def rows(parts: Any, sets: Mapping[str, Any]) -> Callable[[int], Experience]:
        def at(step: int) -> Experience:
            batch = batches[step]
            fields = {name: jnp.asarray(value) for name, value in batch.fields.items()}
            weight = fields.pop("weight", None)
            made = written_rows(
                *(jnp.asarray(array) for array in batch[:5]),
                answer_width=sizes["max_completion_tokens"] if beside else 1,
                rows_per_group=per_group,
                alone=not beside,
                **fields,
            )
            return made if weight is None else replace(made, weight=weight)

        return at

    margin = any("margin" in row.values for group in groups for row in group)
    attributes = asked.get("attributes", ())
    widths = (("rating", len(attributes)),) if attributes else ()
    stored = {STORED} if groups[0][0].reference is not None else set()
    source = Written(count, per_group, PROVIDES[kind] | ({"margin"} if margin else set()) | stored, widths)
    left_out = {**dropped, **({"too long": batches.dropped} if batches.dropped else {})}
    return Feed(source, rows, file=digest[:16], dropped=left_out)


def _of_kind(kind: Kind, own: Callable[..., dict[str, Any]]) -> Callable[..., Feed]:
    """A source of one kind of file; its keywords are those of all kinds, and those of `own`."""

    def every(
        *,
        groups_per_step: int,
        samples_per_prompt: int,
        beside: bool,
        tokenizer: Any,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        seed: int,
        overlong_prompts: str,
        file: str | None = None,
        columns: dict[str, str] | None = None,
    ) -> None: ...

    def read(**given: Any) -> Feed:
        told = ("file", "columns", "groups_per_step", "beside")
        options = {name: given.pop(name) for name in list(given) if name in own_names}
        file, columns, groups, beside = (given.pop(name, None) for name in told)
        return _judged(kind, file, columns, groups, beside, given, **own(**options))

    both = [inspect.signature(function, eval_str=True).parameters for function in (every, own)]
    own_names = set(both[1])
    read.__signature__ = inspect.Signature([*both[0].values(), *both[1].values()])  # type: ignore[attr-defined]
    read.__name__ = read.__qualname__ = kind
    read.__doc__ = (
        f"The {kind} of a data set, `groups_per_step` of them in a step. See `data.row_files` for the values of `file` "
        f"and `data.written` for the columns; `columns` maps these names to those of the file.\n\n{own.__doc__}"
    )
    return read


@ranged
def _of_pairs(*, unusable: Unusable = "error", flipped: Annotated[float, Range(0, 1)] = 0.0) -> dict[str, Any]:
    """
    Args:
      unusable: "drop" drops and counts ties and pairs of equal completions; "error" refuses them.
      flipped: share of pairs, chosen by the seed of the run, whose label is reversed (to study noisy labels).
    """
    return {"unusable": unusable, "flipped": flipped}


def _of_rankings(*, unusable: Unusable = "error") -> dict[str, Any]:
    """
    Args:
      unusable: "drop" drops and counts rankings with equal completions; "error" refuses them.
    """
    return {"unusable": unusable}


def _of_ratings(
    *, attributes: tuple[str, ...] = (), lowest: float | None = None, highest: float | None = None
) -> dict[str, Any]:
    """
    Args:
      attributes: columns of ratings, such as [helpfulness, correctness], for a head with one output for each.
      lowest, highest: bounds of a rating, inclusive; a rating outside is an error. None sets no bound.
    """
    return {"attributes": tuple(attributes), "lowest": lowest, "highest": highest}


@ranged
def _of_labels(*, flipped: Annotated[float, Range(0, 1)] = 0.0) -> dict[str, Any]:
    """A label is true, false, or a number between 0 and 1.

    Args:
      flipped: share of labels that are inverted, chosen by the seed of the run, to study label noise.
    """
    return {"flipped": flipped}


def _of_steps() -> dict[str, Any]:
    """The label of a step is placed on its last token."""
    return {}


def _of_verdicts(
    *, question: str = QUESTION, verdict: str = VERDICT, both_orders: bool = False, unusable: Unusable = "error"
) -> dict[str, Any]:
    """
    Args:
      unusable: "drop" drops and counts ties and equal answers; otherwise they are errors.
      question: format of the prompt, with {prompt}, {first} and {second}.
      verdict: format of the completion of the judge, with {rationale} and {verdict}, which is A or B.
      both_orders: make two rows of each, one per order of the answers; rationales must then not mention A and B.
    """
    for name, text, places in (
        ("question", question, ("prompt", "first", "second")),
        ("verdict", verdict, ("verdict",)),
    ):
        if lacks := [place for place in places if f"{{{place}}}" not in text]:
            raise ValueError(f"source.verdicts.{name} is {text!r}, without {{{lacks[0]}}}; add it to the text")
    return {"question": question, "verdict": verdict, "both_orders": both_orders, "unusable": unusable}


pairs, rankings, ratings = (
    _of_kind("pairs", _of_pairs),
    _of_kind("rankings", _of_rankings),
    _of_kind("ratings", _of_ratings),
)
labels, steps, verdicts = (
    _of_kind("labels", _of_labels),
    _of_kind("steps", _of_steps),
    _of_kind("verdicts", _of_verdicts),
)


@ranged
def distributions(
    *,
    file: str,
    sequences_per_step: Count,
    samples_per_prompt: int,
    beside: bool,
    tokenizer: Any,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    seed: int,
    overlong_prompts: Literal["error", "drop"],
) -> Feed:
    """Completions of a file with the most likely tokens of a teacher at each position, read by the network `file`.

    Args:
      file: with rows as in `data.top_tokens`.
      sequences_per_step: rows of a step; with samples in the batch, a multiple of samples_per_prompt.
    """
    group = samples_per_prompt if beside else 1
    _check_multiple("distributions", sequences_per_step, group)
    likely, digest = likely_rows(file)
    batches = likely_batches(
        likely,
        tokenizer,
        sequences_per_step=sequences_per_step,
        max_prompt_tokens=max_prompt_tokens,
        max_completion_tokens=max_completion_tokens,
        seed=seed,
        overlong=overlong_prompts,
    )

    def rows(parts: Any, sets: Mapping[str, Any]) -> Callable[[int], Experience]:
        sizes = {"answer_width": max_completion_tokens if beside else 1, "rows_per_group": group, "alone": not beside}

        def at(step: int) -> Experience:
            arrays = [jnp.asarray(array) for array in batches[step]]
            return written_rows(*arrays[:5], **sizes, top_tokens=arrays[5], top_logprobs=arrays[6])

        return at

    names = ("top_tokens", "top_logprobs")
    source = Written(sequences_per_step, group, frozenset(names), tuple((name, most_likely(likely)) for name in names))
    left_out = {"too long": batches.dropped} if batches.dropped else {}
    return Feed(source, rows, file=digest[:16], dropped=left_out)


__all__ = [
    "Feed",
    "demonstrations",
    "distributions",
    "hardest",
    "labels",
    "pairs",
    "rankings",
    "ratings",
    "replay",
    "sampler",
    "solved_answers",
    "steps",
    "verdicts",
]
