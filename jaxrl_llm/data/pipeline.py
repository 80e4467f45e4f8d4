"""From items to batches of tokens. A position in the data is one integer: `batches[step]` is a pure function of step.

All items are encoded and checked before the first batch, so a prompt that is too long is reported at the start.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.bounds import counted
from jaxrl_llm.data.buckets import bucket_of
from jaxrl_llm.data.encoding import (
    Overlong,
    Record,
    Row,
    Tokenizer,
    answer_ids,
    encoded_rows,
    padded_arrays,
    padded_prompts,
)
from jaxrl_llm.data.order import Batches, mixed_batches, require_positive, shuffled_batches
from jaxrl_llm.data.tasks.items import Segment, named_item, reference_response
from jaxrl_llm.experience import Prompts, Source


class PromptBatch(NamedTuple):
    """Prompts of one step.

    Attributes:
      prompts: tokens, N rows.
      items: the records behind the rows, for rewards on the host.
    """

    prompts: Prompts
    items: list[Record]


class EvaluationBatch(NamedTuple):
    """Prompts of one evaluation batch.

    Attributes:
      prompts: tokens, N rows.
      items: the records behind the rows.
      weight: 1 for a row that counts; 0 for a copy of the batch's first row that fills the last batch.
    """

    prompts: Prompts
    items: list[Record]
    weight: np.ndarray


class SupervisedBatch(NamedTuple):
    """Prompts with reference completions, laid out as in `Experience`.

    Attributes:
      prompt_tokens: [B, P], left-padded.
      prompt_length: [B].
      tokens: [B, T], right-padded; end of sequence included.
      length: [B], completion tokens including end of sequence.
      weight: [B], 1 for each row.
      prompt_id: [B].
      items: the records behind the rows.
      source: [B, T] a `Source` for each token.
      mask: [B, T] 1 on the tokens that are trained on.
      turn: [B, T] index of the turn of each token, 0 for a single turn; an observation has the index of the turn before
        it.
    """

    prompt_tokens: np.ndarray
    prompt_length: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    weight: np.ndarray
    prompt_id: np.ndarray
    items: list[Record]
    source: np.ndarray
    mask: np.ndarray
    turn: np.ndarray


def prompt_batches(
    source: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    prompts_per_step: int,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    seed: int,
    overlong: Overlong = "error",
    max_demonstration_tokens: int | None = None,
    scratchpad: bool = True,
    widths: Sequence[int] | None = None,
    numbered: bool = False,
    prompt_columns: Sequence[str] = (),
) -> Batches[PromptBatch]:
    """Batches of prompts for sampling, in a new order each epoch.

    If there are fewer items than prompts in a batch, items are repeated; `repeat` of the prompts numbers the copies, so
    that their samples differ.

    The tokenizer adds the text around a body in the prompt.

    Args:
      source: `DataSet`, `ProblemSet`, or any sequence of `Item`s or of mappings with `body` and `answer`. Prompts of a
        mixture have a `source_id`, and are drawn in proportion to its weights.
      tokenizer: text -> ids.
      prompts_per_step: rows in a batch.
      max_prompt_tokens: width of the prompts.
      max_answer_tokens: width of the reference answers.
      seed: seed of the orders.
      overlong: for items that do not fit: "error", or "drop" (and count).
      max_demonstration_tokens: width of the reference completions in the batch; None for no reference completions.
      scratchpad: reference completions have the think part; otherwise they are the direct variant.
      widths: allowed widths of prompts; a batch has the smallest one that fits all of its prompts. None is only
        `max_prompt_tokens`.
      prompt_columns: columns of the records whose texts are further prompts of the same problem. They are encoded like
        the prompt, as `<column>_tokens` and `<column>_length` of the prompts.
      numbered: prompts have the number of their `item` in the source, and `Batches.chosen` makes batches of any items.

    Raises:
      ValueError: for an item that is too long, no items, or numbered items of which some are dropped.
    """
    limits = (max_prompt_tokens, max_answer_tokens)
    rows, dropped = encoded_rows(source, tokenizer, answer_ids(tokenizer), "answer", limits, overlong)
    others: dict[str, dict[int, Row]] = {}
    for column in prompt_columns:
        others[column] = _in_other_words(rows, column, tokenizer, limits, overlong)
        kept = [row for row in rows if row.item["item_id"] in others[column]]
        rows, dropped = kept, dropped + len(rows) - len(kept)
    if numbered and dropped:
        raise ValueError(
            f"{counted(dropped, 'prompt')} would be dropped for length, but data.selection needs all items; remove "
            "such prompts from the data, or raise the limits"
        )
    written: dict[int, Row] = {}
    if max_demonstration_tokens is not None:
        together = (max_prompt_tokens, max_demonstration_tokens)
        fitting, _ = encoded_rows(
            source, tokenizer, completion_ids(tokenizer, scratchpad), "completion", together, overlong
        )
        written = {row.item["item_id"]: row for row in fitting}
        kept = [row for row in rows if row.item["item_id"] in written]
        rows, dropped = kept, dropped + len(rows) - len(kept)

    number_of = {id(row): number for number, row in enumerate(rows)}
    sources = tuple(getattr(source, "sources", ()))

    def batch(chosen: Sequence[Row], repeat: np.ndarray | None = None) -> PromptBatch:
        said = {column: [found[row.item["item_id"]] for row in chosen] for column, found in others.items()}
        width = _width([*chosen, *(row for each in said.values() for row in each)], max_prompt_tokens, widths)
        prompts = padded_prompts(chosen, tokenizer.pad_id, (width, max_answer_tokens))
        more: dict[str, Any] = {}
        for column, again in said.items():
            arrays = padded_arrays(again, tokenizer.pad_id, (width, max_answer_tokens))
            more |= {f"{column}_tokens": arrays["tokens"], f"{column}_length": arrays["length"]}
        if max_demonstration_tokens is not None:
            completions = [written[row.item["item_id"]] for row in chosen]
            arrays = padded_arrays(completions, tokenizer.pad_id, (width, max_demonstration_tokens))
            more |= {
                "demonstration_tokens": arrays["answer_tokens"],
                "demonstration_length": arrays["answer_length"],
            }
        if repeat is not None:
            more["repeat"] = repeat
        if sources:
            more["source_id"] = np.array([sources.index(row.item["data_source"]) for row in chosen], np.int32)
        if numbered:
            more["item"] = np.array([number_of[id(row)] for row in chosen], np.int32)
        prompts = dataclasses.replace(prompts, fields={**prompts.fields, **more})
        return PromptBatch(prompts, [row.item for row in chosen])

    def by_number(numbers: Sequence[int]) -> PromptBatch:
        return _counted(batch, [rows[int(number)] for number in numbers])

    batches = _in_order(source, rows, dropped, batch, prompts_per_step, seed)
    return dataclasses.replace(batches, kept=len(rows), chosen=by_number if numbered else None)


def _in_order(
    source: Any, rows: list[Row], dropped: int, batch: Callable[..., PromptBatch], prompts_per_step: int, seed: int
) -> Batches[PromptBatch]:
    """The batches of a weighted mixture, of fewer rows than a batch has, or of more rows."""
    several, name = partial(_counted, batch), "prompts_per_step"
    require_positive(name, prompts_per_step)
    if getattr(source, "weights", ()):
        return mixed_batches(_pools(source, rows), dropped, several, name, prompts_per_step, seed)
    if rows and len(rows) < prompts_per_step:
        copies = rows * -(-prompts_per_step // len(rows))
        return shuffled_batches(copies, dropped, several, name, prompts_per_step, seed)
    return shuffled_batches(rows, dropped, batch, name, prompts_per_step, seed)


def _counted(batch: Callable[..., PromptBatch], chosen: Sequence[Row]) -> PromptBatch:
    """A batch of rows with repetitions, whose copies are numbered."""
    seen: Counter[int] = Counter()
    copies = []
    for row in chosen:
        copies.append(seen[id(row)])
        seen[id(row)] += 1
    return batch(chosen, np.array(copies, np.int32))


def _pools(source: Any, rows: Sequence[Row]) -> dict[str, tuple[list[Row], float]]:
    """The rows of each source of a mixture with its weight.

    Raises:
      ValueError: if a source has no row that fits.
    """
    pools = {}
    for name, weight in zip(source.sources, source.weights, strict=True):
        pools[name] = ([row for row in rows if row.item["data_source"] == name], weight)
        if not pools[name][0]:
            raise ValueError(f"no prompt of source {name} fits; raise the limits, or remove the source")
    return pools


def _in_other_words(
    rows: Sequence[Row], column: str, tokenizer: Tokenizer, limits: tuple[int, int], overlong: Overlong
) -> dict[int, Row]:
    """Rows with the texts of a column as their prompts, by the id of the item."""
    told = []
    for row in rows:
        text = row.item.get(column) or row.item.get("raw", {}).get(column)
        if not text:
            raise ValueError(
                f"{named_item(row.item)} ({row.item['body'][:80]!r}) has no {column!r}, which the step reads; add "
                "the column to the data, write it as a template (data.privileged), or choose a task that has it "
                "(addition has paraphrases and scaffolds)"
            )
        told.append({**row.item, "body": text})
    fitting, _ = encoded_rows(told, tokenizer, answer_ids(tokenizer), "answer", limits, overlong)
    return {row.item["item_id"]: row for row in fitting}


def completion_ids(tokenizer: Tokenizer, scratchpad: bool) -> Callable[[Record], list[int]]:
    """The function from a record to the token ids of its reference completion, end of sequence included."""
    return lambda item: tokenizer.completion_ids(item, _reference(item, scratchpad))


def segment_ids(tokenizer: Tokenizer, segments: Sequence[Segment]) -> tuple[list[int], np.ndarray]:
    """(token ids of a conversation, [3, T] source, whether it is trained on, and turn of each).

    Every segment is encoded separately, as it is sampled or appended.
    """
    ids: list[int] = []
    facts: list[tuple[int, bool, int]] = []
    turn = -1
    for segment in segments:
        observed = segment.source == Source.OBSERVATION
        turn += not observed
        text = segment.text.removesuffix("<eos>")
        found = tokenizer.encode(text) + ([tokenizer.eos_id] if text != segment.text else [])
        ids += found
        facts += [(segment.source, segment.trained and not observed, max(turn, 0))] * len(found)
    return ids, np.asarray(facts, np.int16).reshape(-1, 3).T


def supervised_batches(
    source: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    sequences_per_step: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    seed: int,
    scratchpad: bool = True,
    overlong: Overlong = "error",
    segments: Callable[[Record], Sequence[Segment]] | None = None,
) -> Batches[SupervisedBatch]:
    """Batches of prompts and reference completions for supervised fine-tuning, in a new order each epoch.

    Args:
      source: as for `prompt_batches`.
      tokenizer: text -> ids.
      sequences_per_step: rows in a batch.
      max_prompt_tokens: width of the prompts.
      max_completion_tokens: width of the completions.
      seed: seed of the orders.
      scratchpad: completions have the think part; otherwise they are the direct variant (`Task.scratchpad`). The
        `response` of a record, if there is one, is the completion in both cases.
      overlong: for items that do not fit: "error", or "drop" (and count).
      segments: record -> its reference conversation, used instead of a completion; `Task.segments`.

    Raises:
      ValueError: for an item that is too long, or fewer items than `sequences_per_step`.
    """
    limits = (max_prompt_tokens, max_completion_tokens)
    completion = completion_ids(tokenizer, scratchpad)
    spoken: dict[int, np.ndarray] = {}

    def conversation(item: Record) -> list[int]:
        if segments is None:
            return completion(item)
        ids, spoken[item["item_id"]] = segment_ids(tokenizer, segments(item))
        return ids

    rows, dropped = encoded_rows(source, tokenizer, conversation, "completion", limits, overlong)

    def batch(chosen: Sequence[Row]) -> SupervisedBatch:
        arrays = padded_arrays(chosen, tokenizer.pad_id, limits)
        facts = np.zeros((3, len(chosen), max_completion_tokens), np.int32)
        for number, row in enumerate(chosen):
            alone = np.asarray([[Source.DEMONSTRATION], [1], [0]])
            facts[:, number, : len(row.completion)] = spoken.get(row.item["item_id"], alone)
        return SupervisedBatch(
            prompt_tokens=arrays["tokens"],
            prompt_length=arrays["length"],
            tokens=arrays["answer_tokens"],
            length=arrays["answer_length"],
            weight=np.ones(len(chosen), np.float32),
            prompt_id=arrays["prompt_id"],
            items=[row.item for row in chosen],
            source=facts[0].astype(np.int8),
            mask=facts[1].astype(np.float32),
            turn=facts[2],
        )

    if getattr(source, "weights", ()):
        return mixed_batches(_pools(source, rows), dropped, batch, "sequences_per_step", sequences_per_step, seed)
    return shuffled_batches(rows, dropped, batch, "sequences_per_step", sequences_per_step, seed)


def evaluation_batches(
    items: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    prompts_per_batch: int,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    overlong: Overlong = "error",
    widths: Sequence[int] | None = None,
) -> list[EvaluationBatch]:
    """All items once, in order, in batches of one size; the last batch is padded with rows of weight 0.

    Prompts have the width `max_prompt_tokens`, or the smallest of `widths` that fits the prompts of the batch.
    """
    limits = (max_prompt_tokens, max_answer_tokens)
    rows, _ = encoded_rows(items, tokenizer, answer_ids(tokenizer), "answer", limits, overlong)
    require_positive("prompts_per_batch", prompts_per_batch)
    batches = []
    for start in range(0, len(rows), prompts_per_batch):
        real = rows[start : start + prompts_per_batch]
        chosen = real + [real[0]] * (prompts_per_batch - len(real))
        weight = (np.arange(prompts_per_batch) < len(real)).astype(np.float32)
        width = _width(real, max_prompt_tokens, widths)
        prompts = padded_prompts(chosen, tokenizer.pad_id, (width, max_answer_tokens))
        batches.append(EvaluationBatch(prompts, [row.item for row in chosen], weight))
    return batches


def _width(rows: Sequence[Row], max_prompt_tokens: int, widths: Sequence[int] | None) -> int:
    return bucket_of(max(len(row.prompt) for row in rows), widths or (max_prompt_tokens,))


def _reference(item: Record, scratchpad: bool) -> str:
    """Reference completion of a record, without end of sequence, which the tokenizer adds."""
    if "response" not in item:
        return reference_response(item, scratchpad).removesuffix("<eos>")
    if not item["response"]:
        raise ValueError(
            "the record has no reference completion to learn from; set the column of reference completions "
            "(data.fields={response: COLUMN}), or skip the supervised steps (warm_start.steps=0)"
        )
    return item["response"]
