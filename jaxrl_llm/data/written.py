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
Kind = Literal["pairs", "rankings", "ratings", "labels", "steps"]
# Names that rows of each kind know, see `jaxrl_llm.fields`.
PROVIDES: Mapping[str, frozenset[str]] = {
    "pairs": frozenset({"preferred"}),
    "rankings": frozenset({"rank"}),
    "ratings": frozenset({"rating"}),
    "labels": frozenset({"preferred"}),
    "steps": frozenset({"step_labels"}),
}


class Judged(NamedTuple):
    """One completion of a file.

    Attributes:
      prompt: its prompt's text.
      text: of the completion, without end of sequence.
      value: preferred (1 or 0), rank (0 is best), or rating.
      steps: texts of its steps with the label of each; empty for other kinds.
      where: its file and line.
    """

    prompt: str
    text: str
    value: float
    steps: tuple[tuple[str, float], ...] = ()
    where: str = ""


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


_READERS: Mapping[str, Callable[[Mapping[str, Any], str], list[Judged]]] = {
    "pairs": _pair,
    "rankings": _ranking,
    "ratings": _rating,
    "labels": _label,
    "steps": _steps,
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
    listed = {name: _listed(record[name]) for name in ("completions", "steps", "labels") if name in record}
    return {**record, **listed, **named}


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
            else:
                values[place] = value
        return WrittenBatch(
            prompt_tokens,
            np.array([len(row[0]) for row in rows], np.int32),
            np.array([row[3] for row in rows], np.int32),
            tokens,
            np.array([len(row[1]) for row in rows], np.int32),
            {name: values},
        )

    return shuffled_batches(kept, dropped, batch, "groups_per_step", groups_per_step, seed)


def _encoded(row: Judged, number: int, tokenizer: Tokenizer) -> tuple[list[int], list[int], Any, int]:
    item = {"body": row.prompt, "item_id": number}
    completion = list(tokenizer.completion_ids(item, row.text))
    if not row.steps:
        return list(tokenizer.prompt_ids(item)), completion, row.value, number
    ends, text = [], ""
    for step, label in row.steps:
        text += step
        # A step ends where the tokens of the text up to its end do.
        ends.append((len(tokenizer.encode(text)), label))
    return list(tokenizer.prompt_ids(item)), completion, ends, number
