"""Items as token ids: left-padded prompts and right-padded answers, never truncated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jaxrl_llm.bounds import counted
from jaxrl_llm.data.tasks.items import named_item, record
from jaxrl_llm.experience import Prompts

Overlong = Literal["error", "drop"]
Record = dict[str, Any]


class Tokenizer(Protocol):
    """The tokenizer interface of the pipeline; `CharacterTokenizer` and `HuggingFaceTokenizer` are two.

    Attributes:
      pad_id: padding; may be one of `eos_ids`.
      eos_id: ends reference completions.
      eos_ids: every id that ends a completion; `eos_id` is the first.
      vocabulary_size: one more than the largest id.
      encode: ids of a text, without added special tokens.
      decode: the text of ids.
      token_bytes: the bytes of each token, by id; None for tokens without text.
      prompt_ids: ids of a record's whole prompt, template included.
      completion_ids: ids of a completion to a record's prompt, end of sequence included.
    """

    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def vocabulary_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self) -> list[bytes | None]: ...
    def prompt_ids(self, item: Mapping[str, Any]) -> list[int]: ...
    def completion_ids(self, item: Mapping[str, Any], text: str) -> list[int]: ...


class Row(NamedTuple):
    """One item as token ids.

    Attributes:
      item: its record.
      prompt: token ids of the item's prompt.
      completion: token ids of the reference answer or reference completion.
    """

    item: Record
    prompt: list[int]
    completion: list[int]


def encode_prompts(
    items: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    overlong: Overlong = "error",
) -> Prompts:
    """Prompts of a list of items, in order; items that are too long are an error or are left out."""
    limits = (max_prompt_tokens, max_answer_tokens)
    rows, _ = encoded_rows(items, tokenizer, answer_ids(tokenizer), "answer", limits, overlong)
    return padded_prompts(rows, tokenizer.pad_id, limits)


def answer_ids(tokenizer: Tokenizer) -> Callable[[Record], list[int]]:
    """The function from a record to the token ids of its reference answer."""
    return lambda item: tokenizer.encode(item["answer"])


def encoded_rows(
    source: Sequence[Any],
    tokenizer: Tokenizer,
    completion: Callable[[Record], list[int]],
    completion_name: str,
    limits: tuple[int, int],
    overlong: Overlong,
) -> tuple[list[Row], int]:
    """(the items of the source as token ids, the number of dropped items).

    Raises:
      ValueError: for an item that cannot be encoded, or that is too long if overlong is "error"; names the item.
    """
    if overlong not in ("error", "drop"):
        raise ValueError(f"overlong is {overlong!r}; it must be 'error' or 'drop'")
    names = (f"max_prompt_tokens={limits[0]}", f"max_{completion_name}_tokens={limits[1]}")
    rows, dropped, ids, first = [], 0, set(), ""
    longest = [0, 0]
    for item in _records(source):
        _require_id(item, ids)
        row = _row(item, tokenizer, completion)
        excess = [
            f"its {what} has {len(tokens)} tokens, more than {name}"
            for what, tokens, limit, name in zip(("prompt", completion_name), row[1:], limits, names, strict=True)
            if len(tokens) > limit
        ]
        if excess:
            first = first or f"{named_item(item)} ({item['body'][:80]!r}) does not fit: {' and '.join(excess)}"
        dropped += bool(excess)
        longest = [max(length, len(tokens)) for length, tokens in zip(longest, row[1:], strict=True)]
        rows += [] if excess else [row]
    if dropped and overlong == "error":
        raise ValueError(
            f"{first}; {dropped} of {counted(dropped + len(rows), 'item')} too long; the longest prompt has "
            f"{longest[0]} tokens and the longest {completion_name} {longest[1]}: raise the limit (in a config "
            "rollout.max_prompt_tokens or rollout.max_completion_tokens), or set overlong (data.overlong_prompts) to "
            "'drop' to leave such items out"
        )
    if not rows:
        raise ValueError(
            f"no item is left of {dropped} in the source: prompts have up to {longest[0]} tokens and {completion_name}"
            f"s up to {longest[1]}, but {' and '.join(names)}; raise the limits, or give data that is not empty"
        )
    return rows, dropped


def _row(item: Record, tokenizer: Tokenizer, completion: Callable[[Record], list[int]]) -> Row:
    try:
        return Row(item, tokenizer.prompt_ids(item), completion(item))
    except ValueError as error:
        raise ValueError(f"{named_item(item)} ({item['body'][:80]!r}) cannot be encoded: {error}") from error


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


def padded_arrays(rows: Sequence[Row], pad_id: int, limits: tuple[int, int]) -> dict[str, np.ndarray]:
    """The fields of `Prompts` as int32 arrays; the completions of the rows are the answers."""
    tokens = np.full((len(rows), limits[0]), pad_id, np.int32)
    answers = np.full((len(rows), limits[1]), pad_id, np.int32)
    for index, row in enumerate(rows):
        tokens[index, limits[0] - len(row.prompt) :] = row.prompt
        answers[index, : len(row.completion)] = row.completion
    return {
        "tokens": tokens,
        "length": np.array([len(row.prompt) for row in rows], np.int32),
        "prompt_id": np.array([row.item["item_id"] for row in rows], np.int32),
        "answer_tokens": answers,
        "answer_length": np.array([len(row.completion) for row in rows], np.int32),
    }


def padded_prompts(rows: Sequence[Row], pad_id: int, limits: tuple[int, int]) -> Prompts:
    """The rows as `Prompts` of NumPy arrays."""
    fields: dict[str, Any] = dict(padded_arrays(rows, pad_id, limits))
    return Prompts(**fields)
