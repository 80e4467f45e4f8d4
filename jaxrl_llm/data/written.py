"""Completions that somebody wrote and judged: pairs, rankings, ratings, labels of rows or of their steps, from a file.

Each row becomes a group of completions of one prompt with the fields that say how they were judged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.bounds import shown
from jaxrl_llm.data.encoding import Tokenizer
from jaxrl_llm.data.order import Batches, shuffled_batches
from jaxrl_llm.data.row_files import row_objects
from jaxrl_llm.data.row_templates import column_value

_LARGEST = float(np.finfo(np.float32).max)
Kind = Literal["pairs", "rankings", "ratings", "labels", "steps", "distributions"]
# Names that rows of each kind know, see `jaxrl_llm.fields`.
PROVIDES: Mapping[str, frozenset[str]] = {
    "pairs": frozenset({"preferred"}),
    "rankings": frozenset({"rank"}),
    "ratings": frozenset({"rating"}),
    "labels": frozenset({"preferred"}),
    "steps": frozenset({"step_labels"}),
    "distributions": frozenset({"top_tokens", "top_logprobs"}),
}


class Judged(NamedTuple):
    """One completion of a file.

    Attributes:
      prompt: its prompt's text.
      text: of the completion, without end of sequence.
      value: preferred (1 or 0), rank (0 is best), or rating.
      steps: texts of its steps with the label of each; empty for other kinds.
      where: its file and line.
      top: for each token of the completion the ids of likely tokens and their log-probabilities; empty for other kinds.
    """

    prompt: str
    text: str
    value: float
    steps: tuple[tuple[str, float], ...] = ()
    where: str = ""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


class WrittenBatch(NamedTuple):
    """Completions of one step, laid out as in `Experience`; rows of a group follow one another."""

    prompt_tokens: np.ndarray
    prompt_length: np.ndarray
    prompt_id: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    fields: dict[str, np.ndarray]


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    return _is_text(record.get(key), key, where)


def _is_text(value: Any, what: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{where} has {what} {shown(value)}, which is no text; write it in quotes")


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, str):  # a cell of a CSV file
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ValueError(f"{where} has {what} {shown(value)}; it must be a finite number")
    return float(value)


def _distinct(texts: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise ValueError(f"{where} has two equal completions {text[:40]!r}, of which none is better; leave one out")
        seen.add(text)


def _pair(record: Mapping[str, Any], where: str) -> list[Judged]:
    prompt, chosen, rejected = (_text(record, key, where) for key in ("prompt", "chosen", "rejected"))
    _distinct([chosen, rejected], where)
    return [Judged(prompt, chosen, 1.0), Judged(prompt, rejected, 0.0)]


def _ranking(record: Mapping[str, Any], where: str) -> list[Judged]:
    texts = record.get("completions")
    if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
        raise ValueError(
            f"{where} has completions {shown(texts)}; a ranking is a list of at least two texts, the best first"
        )
    prompt, texts = _text(record, "prompt", where), [_is_text(text, "completion", where) for text in texts]
    _distinct(texts, where)
    return [Judged(prompt, text, float(rank)) for rank, text in enumerate(texts)]


def _rating(record: Mapping[str, Any], where: str) -> list[Judged]:
    prompt, text = _text(record, "prompt", where), _text(record, "completion", where)
    return [Judged(prompt, text, _number(record.get("rating"), "rating", where))]


def _label(record: Mapping[str, Any], where: str) -> list[Judged]:
    prompt, text, value = _text(record, "prompt", where), _text(record, "completion", where), record.get("label")
    if isinstance(value, str):  # a cell of a CSV file
        value = {"true": 1, "1": 1, "false": 0, "0": 0}.get(value.lower(), value)
    if value not in (0, 1):
        raise ValueError(f"{where} has label {shown(value)}; it must be true or false, 1 or 0")
    return [Judged(prompt, text, float(value))]


def _steps(record: Mapping[str, Any], where: str) -> list[Judged]:
    prompt, steps, labels = _text(record, "prompt", where), record.get("steps"), record.get("labels")
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        raise ValueError(f"{where} has {shown(steps)} as steps and {shown(labels)} as labels; give lists of one length")
    if "" in steps:
        raise ValueError(f"{where} has an empty step, which has no last token to be labelled; leave it out")
    pairs = tuple(
        (_is_text(step, "step", where), _number(int(label) if isinstance(label, bool) else label, "label", where))
        for step, label in zip(steps, labels, strict=True)
    )
    return [Judged(prompt, "".join(step for step, _ in pairs), 0.0, pairs)]


def _distributions(record: Mapping[str, Any], where: str) -> list[Judged]:
    prompt, text = _text(record, "prompt", where), _text(record, "completion", where)
    tokens, logprobs = record.get("top_tokens"), record.get("top_logprobs")
    if not (isinstance(tokens, list) and isinstance(logprobs, list) and len(tokens) == len(logprobs) and tokens):
        raise ValueError(
            f"{where} has {shown(tokens)} as top_tokens and {shown(logprobs)} as top_logprobs; give a list of ids and "
            "one of log-probabilities for each token of the completion, end of sequence included"
        )
    top = []
    for place, (ids, values) in enumerate(zip(tokens, logprobs, strict=True)):
        if not (isinstance(ids, list) and isinstance(values, list) and len(ids) == len(values) and ids):
            raise ValueError(f"{where} has {shown(ids)} and {shown(values)} at token {place}; give lists of one length")
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError(f"{where} has top_tokens {shown(ids)} at token {place}; give different ids, 0 or above")
        known = [_number(value, "log-probability", where) for value in values]
        if max(known) > 0 or sum(np.exp(known)) > 1.001:
            raise ValueError(
                f"{where} has log-probabilities {shown(values)} at token {place}, which sum to more than 1"
            )
        top.append(tuple(zip(ids, known, strict=True)))
    return [Judged(prompt, text, 0.0, top=tuple(top), where=where)]


_READERS: Mapping[str, Callable[[Mapping[str, Any], str], list[Judged]]] = {
    "pairs": _pair,
    "rankings": _ranking,
    "ratings": _rating,
    "labels": _label,
    "steps": _steps,
    "distributions": _distributions,
}


def judged_groups(
    path: str | Path, kind: Kind, columns: Mapping[str, str] | None = None
) -> tuple[list[list[Judged]], str]:
    """(the groups of a data set, a row each; a hash of it). `row_files` says what may be read.

        pairs      {"prompt": ..., "chosen": ..., "rejected": ...}
        rankings   {"prompt": ..., "completions": [best, ..., worst]}
        ratings    {"prompt": ..., "completion": ..., "rating": 3.5}
        labels     {"prompt": ..., "completion": ..., "label": true}
        steps      {"prompt": ..., "steps": ["...", "..."], "labels": [1, 0]}
        distributions  {"prompt": ..., "completion": ..., "top_tokens": [[5, 7], ...], "top_logprobs": [[-0.1, -2], ..]}

    Args:
      path: of the data set.
      kind: of its rows.
      columns: name above -> the column that holds it, or a template of several, where they are called otherwise.

    Raises:
      ValueError: for what cannot be read, or a row that cannot be used, by file and line; groups of different sizes.
    """
    if kind not in _READERS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(_READERS)}")
    objects, digest = row_objects(path, "source file")
    groups = [
        [row._replace(where=where) for row in _READERS[kind](_called(record, columns or {}, where), where)]
        for where, record in objects
    ]
    if len(sizes := {len(group) for group in groups}) > 1:
        raise ValueError(f"{path} has groups of {sorted(sizes)} completions; give each line equally many")
    return groups, digest


def _called(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """A row whose columns have the names that its kind wants. Lists that a cell of text holds as JSON are lists."""
    try:
        named = {name: column_value(record, column) for name, column in columns.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    listed = {name: _listed(record[name]) for name in _LISTS if name in record}
    return {**record, **listed, **named}


_LISTS = ("completions", "steps", "labels", "top_tokens", "top_logprobs")


def _listed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    except ValueError:
        return value


def written_batches(
    groups: Sequence[Sequence[Judged]],
    kind: Kind,
    tokenizer: Tokenizer,
    *,
    groups_per_step: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    seed: int,
    overlong: Literal["error", "drop"] = "error",
) -> Batches[WrittenBatch]:
    """Batches of whole groups, in a new order each epoch.

    Args:
      groups: from `judged_groups`, the first of what it returns.
      kind: of the file.
      tokenizer: text -> ids.
      groups_per_step: in a batch.
      max_prompt_tokens, max_completion_tokens: widths; what is longer is an error, or is dropped with its group.
      seed: of the orders.
      overlong: "error", or "drop" to leave groups out and count them.

    Raises:
      ValueError: for a completion that is too long, or fewer groups than a step takes.
    """
    kept, dropped = [], 0
    for number, group in enumerate(groups):
        rows = [_encoded(row, number, tokenizer) for row in group]
        longest = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
        if longest[0] <= max_prompt_tokens and longest[1] <= max_completion_tokens:
            kept.append(rows)
        elif overlong == "drop":
            dropped += 1
        else:
            raise ValueError(
                f"{group[0].where} needs {longest[0]} prompt and {longest[1]} completion tokens, but the "
                f"limits are {max_prompt_tokens} and {max_completion_tokens}; raise them, or set data.overlong_prompts "
                "to drop"
            )
    most = most_likely(groups)
    name = "step_labels" if kind == "steps" else {"rankings": "rank", "ratings": "rating"}.get(kind, "preferred")

    def batch(chosen: Sequence[Any]) -> WrittenBatch:
        rows = [row for group in chosen for row in group]
        count = len(rows)
        prompt_tokens = np.full((count, max_prompt_tokens), tokenizer.pad_id, np.int32)
        tokens = np.full((count, max_completion_tokens), tokenizer.pad_id, np.int32)
        values = np.full((count, max_completion_tokens) if kind == "steps" else count, np.nan, np.float32)
        for place, (prompt, completion, value, _) in enumerate(rows):
            prompt_tokens[place, max_prompt_tokens - len(prompt) :] = prompt
            tokens[place, : len(completion)] = completion
            if kind == "steps":
                for end, label in value:
                    values[place, min(end, len(completion)) - 1] = label
            elif kind != "distributions":
                values[place] = value
        fields = {name: values}
        if kind == "distributions":
            fields = _distribution_arrays([row[2] for row in rows], most, max_completion_tokens)
        return WrittenBatch(
            prompt_tokens,
            np.array([len(row[0]) for row in rows], np.int32),
            np.array([row[3] for row in rows], np.int32),
            tokens,
            np.array([len(row[1]) for row in rows], np.int32),
            fields,
        )

    return shuffled_batches(kept, dropped, batch, "groups_per_step", groups_per_step, seed)


def most_likely(groups: Sequence[Sequence[Judged]]) -> int:
    """Tokens of the longest stored distribution; 0 where there is none."""
    return max((len(place) for group in groups for row in group for place in row.top), default=0)


def _distribution_arrays(rows: Sequence[Any], most: int, width: int) -> dict[str, np.ndarray]:
    """Stored distributions as `top_tokens` and `top_logprobs`, [B, T, most]."""
    tokens = np.full((len(rows), width, most), -1, np.int32)
    logprobs = np.zeros((len(rows), width, most), np.float32)
    for number, places in enumerate(rows):
        for place, likely in enumerate(places):
            tokens[number, place, : len(likely)] = [token for token, _ in likely]
            logprobs[number, place, : len(likely)] = [value for _, value in likely]
    return {"top_tokens": tokens, "top_logprobs": logprobs}


def _encoded(row: Judged, number: int, tokenizer: Tokenizer) -> tuple[list[int], list[int], Any, int]:
    item = {"body": row.prompt, "item_id": number}
    completion = list(tokenizer.completion_ids(item, row.text))
    if row.top and len(row.top) != len(completion):
        raise ValueError(
            f"{row.where} has distributions of {len(row.top)} tokens, but its completion has {len(completion)}, end of "
            "sequence included; both must be of the policy's tokenizer"
        )
    if row.top:
        return list(tokenizer.prompt_ids(item)), completion, row.top, number
    if not row.steps:
        return list(tokenizer.prompt_ids(item)), completion, row.value, number
    ends, text = [], ""
    for step, label in row.steps:
        text += step
        # A step ends where the tokens of the text up to its end do.
        ends.append((len(tokenizer.encode(text)), label))
    return list(tokenizer.prompt_ids(item)), completion, ends, number
