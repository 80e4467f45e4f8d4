"""Completions with a teacher's most likely tokens at each position, from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.bounds import shown
from jaxrl_llm.data.encoding import Tokenizer
from jaxrl_llm.data.order import Batches, shuffled_batches
from jaxrl_llm.data.row_files import row_objects

# Allowed excess of the sum of a position's probabilities over 1, for rounding.
_ROUNDING = 1e-3


class Likely(NamedTuple):
    """One row of a file.

    Attributes:
      prompt, completion: texts; the completion is without end of sequence.
      places: for each token of the completion, end of sequence included, the ids of likely tokens and their
        log-probabilities.
      where: its file and line.
    """

    prompt: str
    completion: str
    places: tuple[tuple[tuple[int, float], ...], ...]
    where: str


class LikelyBatch(NamedTuple):
    """Rows of one step, laid out as in `Experience`; `top_tokens` and `top_logprobs` are [B, T, k]."""

    prompt_tokens: np.ndarray
    prompt_length: np.ndarray
    prompt_id: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


def likely_rows(path: str | Path) -> tuple[list[Likely], str]:
    """(the rows of a file, a hash of the file).

        {"prompt": ..., "completion": ..., "top_tokens": [[5, 7], ...], "top_logprobs": [[-0.1, -2.5], ...]}

    Raises:
      ValueError: for a row that cannot be used; names file and line.
    """
    objects, digest = row_objects(path, "source file")
    return [_row(record, where) for where, record in objects], digest


def _row(record: Mapping[str, Any], where: str) -> Likely:
    texts = [record.get(name) for name in ("prompt", "completion")]
    for name, text in zip(("prompt", "completion"), texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{where} has {name} {shown(text)}, which is not text; write it in quotes")
    tokens, logprobs = record.get("top_tokens"), record.get("top_logprobs")
    if not (isinstance(tokens, list) and isinstance(logprobs, list) and len(tokens) == len(logprobs) and tokens):
        raise ValueError(
            f"{where} has {shown(tokens)} as top_tokens and {shown(logprobs)} as top_logprobs; give a list of ids and "
            "one of log-probabilities for each token of the completion, end of sequence included"
        )
    places = tuple(_place(*pair, f"at token {n}", where) for n, pair in enumerate(zip(tokens, logprobs, strict=True)))
    return Likely(str(texts[0]), str(texts[1]), places, where)


def _place(ids: Any, values: Any, at: str, where: str) -> tuple[tuple[int, float], ...]:
    if not (isinstance(ids, list) and isinstance(values, list) and len(ids) == len(values) and ids):
        raise ValueError(f"{where} has {shown(ids)} and {shown(values)} {at}; give lists of one length")
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{where} has top_tokens {shown(ids)} {at}; give different ids, 0 or above")
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values) or not np.isfinite(numbers).all():
        raise ValueError(f"{where} has top_logprobs {shown(values)} {at}; they must be finite numbers")
    if max(numbers) > 0 or np.exp(numbers).sum() > 1 + _ROUNDING:
        raise ValueError(f"{where} has top_logprobs {shown(values)} {at}, whose probabilities sum to more than 1")
    return tuple(zip(ids, map(float, values), strict=True))


def most_likely(rows: Sequence[Likely]) -> int:
    """Number of tokens of the longest stored distribution."""
    return max(len(place) for row in rows for place in row.places)


def likely_batches(
    rows: Sequence[Likely],
    tokenizer: Tokenizer,
    *,
    sequences_per_step: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    seed: int,
    overlong: Literal["error", "drop"] = "error",
) -> Batches[LikelyBatch]:
    """Batches of rows, in a new order each epoch.

    Args:
      rows: from `likely_rows`.
      tokenizer: text -> ids.
      sequences_per_step: rows per batch.
      max_prompt_tokens, max_completion_tokens: widths.
      seed: of the orders.
      overlong: "drop" drops and counts longer rows.

    Raises:
      ValueError: for a row that is too long, or whose number of distributions is not its number of tokens.
    """
    kept, dropped, most = [], 0, most_likely(rows)
    for number, row in enumerate(rows):
        item = {"body": row.prompt, "item_id": number}
        prompt, completion = list(tokenizer.prompt_ids(item)), list(tokenizer.completion_ids(item, row.completion))
        if len(row.places) != len(completion):
            raise ValueError(
                f"{row.where} has distributions of {len(row.places)} tokens, but its completion has {len(completion)}, "
                "end of sequence included; both must be of the policy's tokenizer"
            )
        if len(prompt) <= max_prompt_tokens and len(completion) <= max_completion_tokens:
            kept.append((prompt, completion, row.places, number))
        elif overlong == "drop":
            dropped += 1
        else:
            raise ValueError(
                f"{row.where} needs {len(prompt)} prompt and {len(completion)} completion tokens, but the limits are "
                f"{max_prompt_tokens} and {max_completion_tokens}; raise them, or set data.overlong_prompts to drop"
            )

    def batch(chosen: Sequence[Any]) -> LikelyBatch:
        count, width = len(chosen), max_completion_tokens
        prompts = np.full((count, max_prompt_tokens), tokenizer.pad_id, np.int32)
        tokens = np.full((count, width), tokenizer.pad_id, np.int32)
        top_tokens, top_logprobs = np.full((count, width, most), -1, np.int32), np.zeros((count, width, most))
        for place, (prompt, completion, places, _) in enumerate(chosen):
            prompts[place, max_prompt_tokens - len(prompt) :] = prompt
            tokens[place, : len(completion)] = completion
            for at, likely in enumerate(places):
                top_tokens[place, at, : len(likely)] = [token for token, _ in likely]
                top_logprobs[place, at, : len(likely)] = [value for _, value in likely]
        lengths = (np.asarray([len(row[side]) for row in chosen], np.int32) for side in (0, 1))
        number = np.asarray([row[3] for row in chosen], np.int32)
        prompt_length, length = lengths
        return LikelyBatch(prompts, prompt_length, number, tokens, length, top_tokens, top_logprobs.astype(np.float32))

    return shuffled_batches(kept, dropped, batch, "sequences_per_step", sequences_per_step, seed)
