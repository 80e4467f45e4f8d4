"""From items to batches of tokens. A position in the data is one integer: `batches[step]` is a pure function of step.

Everything is encoded and checked before the first batch is made, so a prompt that is too long speaks at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import grain
import numpy as np

from jaxrl_llm.data.tasks.items import Item, record, reference_response
from jaxrl_llm.experience import Prompts

Batch = TypeVar("Batch")
Overlong = Literal["error", "drop"]
Record = dict[str, Any]


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer; `CharacterTokenizer` is one."""

    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...


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
    """

    prompt_tokens: np.ndarray
    prompt_length: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    weight: np.ndarray
    prompt_id: np.ndarray
    items: list[Record]


@dataclass(frozen=True)
class Batches(Generic[Batch]):
    """Batches by step, without end: `batches[step]` is the same whatever was read before.

    Each epoch has its own order. Rows that do not fill a whole batch at the end of an epoch wait for another epoch, so
    that no step holds the same prompt twice.

    Attributes:
      dataset: the grain pipeline.
      steps_per_epoch: batches in one pass over the data.
      kept: items in the data.
      dropped: items left out because they are too long.
    """

    dataset: grain.MapDataset
    steps_per_epoch: int
    kept: int
    dropped: int

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step is {step}; steps count from 0")
        return self.dataset[int(step)]


class _Row(NamedTuple):
    item: Record
    prompt: list[int]
    completion: list[int]


def prompt_batches(
    source: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    prompts_per_step: int,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    seed: int,
    overlong: Overlong = "error",
) -> Batches[PromptBatch]:
    """Batches of prompts for sampling, in a new order each epoch.

    A prompt is begin of sequence, body, newline.

    Args:
      source: `DataSet`, or any sequence of `Item`s or of mappings with `body` and `answer`.
      tokenizer: turns text into ids.
      prompts_per_step: rows in a batch.
      max_prompt_tokens: width of the prompts.
      max_answer_tokens: width of the reference answers.
      seed: seed of the orders.
      overlong: what becomes of an item that does not fit: "error", or "drop" (and count).

    Raises:
      ValueError: for an item that is too long, or fewer items than `prompts_per_step`.
    """
    limits = (max_prompt_tokens, max_answer_tokens)
    rows, dropped = _encoded(source, tokenizer, _answer(tokenizer), "answer", limits, overlong)

    def batch(chosen: Sequence[_Row]) -> PromptBatch:
        return PromptBatch(_prompts(chosen, tokenizer.pad_id, limits), [row.item for row in chosen])

    return _batches(rows, dropped, batch, "prompts_per_step", prompts_per_step, seed)


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
) -> Batches[SupervisedBatch]:
    """Batches of prompts and reference completions for supervised fine-tuning, in a new order each epoch.

    Args:
      source: as for `prompt_batches`.
      tokenizer: turns text into ids.
      sequences_per_step: rows in a batch.
      max_prompt_tokens: width of the prompts.
      max_completion_tokens: width of the completions.
      seed: seed of the orders.
      scratchpad: completions with the think part, or the direct variant; `Task.scratchpad` of the task that made them.
      overlong: what becomes of an item that does not fit: "error", or "drop" (and count).

    Raises:
      ValueError: for an item that is too long, or fewer items than `sequences_per_step`.
    """
    limits = (max_prompt_tokens, max_completion_tokens)

    def response(item: Record) -> list[int]:
        return tokenizer.encode(reference_response(item, scratchpad))

    rows, dropped = _encoded(source, tokenizer, response, "completion", limits, overlong)

    def batch(chosen: Sequence[_Row]) -> SupervisedBatch:
        prompts = _prompts(chosen, tokenizer.pad_id, limits)
        return SupervisedBatch(
            prompt_tokens=prompts.tokens,
            prompt_length=prompts.length,
            tokens=prompts.answer_tokens,
            length=prompts.answer_length,
            weight=np.ones(len(chosen), np.float32),
            prompt_id=prompts.prompt_id,
            items=[row.item for row in chosen],
        )

    return _batches(rows, dropped, batch, "sequences_per_step", sequences_per_step, seed)


def encode_prompts(
    items: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    overlong: Overlong = "error",
) -> Prompts:
    """Prompts of a list of items, in its order; items that are too long are an error or left out."""
    limits = (max_prompt_tokens, max_answer_tokens)
    rows, _ = _encoded(items, tokenizer, _answer(tokenizer), "answer", limits, overlong)
    return _prompts(rows, tokenizer.pad_id, limits)


def evaluation_batches(
    items: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    prompts_per_batch: int,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    overlong: Overlong = "error",
) -> list[EvaluationBatch]:
    """All items once, in order, in batches of one size; the last is filled up with rows of weight 0."""
    limits = (max_prompt_tokens, max_answer_tokens)
    rows, _ = _encoded(items, tokenizer, _answer(tokenizer), "answer", limits, overlong)
    _require_positive("prompts_per_batch", prompts_per_batch)
    batches = []
    for start in range(0, len(rows), prompts_per_batch):
        real = rows[start : start + prompts_per_batch]
        chosen = real + [real[0]] * (prompts_per_batch - len(real))
        weight = (np.arange(prompts_per_batch) < len(real)).astype(np.float32)
        prompts = _prompts(chosen, tokenizer.pad_id, limits)
        batches.append(EvaluationBatch(prompts, [row.item for row in chosen], weight))
    return batches


def _answer(tokenizer: Tokenizer) -> Callable[[Record], list[int]]:
    return lambda item: tokenizer.encode(item["answer"])


def _encoded(
    source: Sequence[Any],
    tokenizer: Tokenizer,
    completion: Callable[[Record], list[int]],
    completion_name: str,
    limits: tuple[int, int],
    overlong: Overlong,
) -> tuple[list[_Row], int]:
    """Every item of the source as token ids, and how many were dropped."""
    if overlong not in ("error", "drop"):
        raise ValueError(f"overlong is {overlong!r}; it must be 'error' or 'drop'")
    names = (f"max_prompt_tokens={limits[0]}", f"max_{completion_name}_tokens={limits[1]}")
    rows, dropped, ids = [], 0, set()
    for item in _records(source):
        _require_id(item, ids)
        row = _Row(item, [tokenizer.bos_id, *tokenizer.encode(item["body"] + "\n")], completion(item))
        excess = [
            f"its {what} has {len(tokens)} tokens, more than {name}"
            for what, tokens, limit, name in zip(("prompt", completion_name), row[1:], limits, names, strict=True)
            if len(tokens) > limit
        ]
        if excess and overlong == "error":
            raise ValueError(
                f"item {item['item_id']} ({item['body'][:80]!r}) does not fit: {' and '.join(excess)}; raise the limit, "
                "or set overlong to 'drop' to leave such items out"
            )
        dropped += bool(excess)
        rows += [] if excess else [row]
    if not rows:
        raise ValueError(
            f"no item is left of {dropped} in the source; it is empty, or {' and '.join(names)} are too low"
        )
    return rows, dropped


def _records(source: Sequence[Any]) -> list[Record]:
    # Reading many records of a stored data set at once is several times faster than one at a time.
    together = getattr(source, "__getitems__", None)
    elements = together(range(len(source))) if together else [source[index] for index in range(len(source))]
    return [record(element, index) for index, element in enumerate(elements)]


def _require_id(item: Record, ids: set[int]) -> None:
    number = item["item_id"]
    if number in ids or not 0 <= number < 2**31:
        raise ValueError(
            f"item_id {number} of {item['body'][:80]!r} is used twice or is outside of [0, 2**31); ids address random "
            "keys and statistics, so each item needs its own"
        )
    ids.add(number)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def _prompts(rows: Sequence[_Row], pad_id: int, limits: tuple[int, int]) -> Prompts:
    tokens = np.full((len(rows), limits[0]), pad_id, np.int32)
    answers = np.full((len(rows), limits[1]), pad_id, np.int32)
    for index, row in enumerate(rows):
        tokens[index, limits[0] - len(row.prompt) :] = row.prompt
        answers[index, : len(row.completion)] = row.completion
    return Prompts(
        tokens=tokens,
        length=np.array([len(row.prompt) for row in rows], np.int32),
        prompt_id=np.array([row.item["item_id"] for row in rows], np.int32),
        answer_tokens=answers,
        answer_length=np.array([len(row.completion) for row in rows], np.int32),
    )


def _batches(
    rows: list[_Row], dropped: int, batch: Callable[[Sequence[_Row]], Batch], size_name: str, size: int, seed: int
) -> Batches[Batch]:
    _require_positive(size_name, size)
    if len(rows) < size:
        raise ValueError(
            f"{size_name} is {size}, but the source has only {len(rows)} items that fit; a step never holds the same "
            f"prompt twice, so lower {size_name} or generate more items"
        )
    epochs = grain.MapDataset.source(rows).seed(seed).shuffle().batch(size, drop_remainder=True, batch_fn=batch)
    return Batches(epochs.repeat(), steps_per_epoch=len(epochs), kept=len(rows), dropped=dropped)
