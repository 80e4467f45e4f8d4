"""Judged completions from files: pairs, rankings, ratings, labels of rows or of their steps, verdicts.

Each row of a file becomes a group of completions of one prompt, with the fields that hold the judgement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.bounds import counted, shown
from jaxrl_llm.data.encoding import Tokenizer
from jaxrl_llm.data.judged_rows import READERS, Asked, Judged, Kind, Tie, named
from jaxrl_llm.data.order import Batches, shuffled_batches
from jaxrl_llm.data.row_files import row_objects
from jaxrl_llm.data.stored_reference import NAME as STORED
from jaxrl_llm.data.stored_reference import reference_row, stored_references

# Fields that rows of each kind provide, see `jaxrl_llm.fields`; `margin` only if a row of the file has one.
PROVIDES: Mapping[str, frozenset[str]] = {
    "pairs": frozenset({"preferred"}),
    "rankings": frozenset({"rank"}),
    "ratings": frozenset({"rating"}),
    "labels": frozenset({"preferred"}),
    "steps": frozenset({"step_labels"}),
    "verdicts": frozenset(),
}


class JudgedFile(NamedTuple):
    """The content of a file of judged completions.

    Attributes:
      groups: completions of one prompt each.
      digest: hash of the file.
      dropped: number of dropped rows, by reason.
    """

    groups: list[list[Judged]]
    digest: str
    dropped: Mapping[str, int] = {}


class WrittenBatch(NamedTuple):
    """Completions of one step, in the layout of `Experience`; rows of a group are adjacent."""

    prompt_tokens: np.ndarray
    prompt_length: np.ndarray
    prompt_id: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    fields: dict[str, np.ndarray]


def judged_groups(
    path: str | Path,
    kind: Kind,
    columns: Mapping[str, str] | None = None,
    *,
    asked: Asked | None = None,
    unusable: Literal["error", "drop"] = "error",
) -> JudgedFile:
    """The groups of a data set, one per row. See `row_files` for the file formats.

        pairs      {"prompt": ..., "chosen": ..., "rejected": ...}
        rankings   {"prompt": ..., "completions": ["best", ..., "worst"]}
        ratings    {"prompt": ..., "completion": ..., "rating": 3.5}
        labels     {"prompt": ..., "completion": ..., "label": true}
        steps      {"prompt": ..., "steps": ["...", "..."], "labels": [1, 0]}
        verdicts   {"prompt": ..., "first": ..., "second": ..., "better": "first", "rationale": ...}

    Pairs may have a "margin", and every row a "weight". The completions of a ranking may be in any order with "ranks":
    [0, 2, 1, ...], 0 for the best and equal for ties. Rows may hold the log-probabilities of a reference, see
    `data.stored_reference`.

    Args:
      path: of the data set.
      kind: of its rows.
      columns: name above -> column of the file, or a template of several columns, if the file has other names.
      asked: options of ratings and verdicts.
      unusable: "drop" drops and counts rows without a better completion: equal completions and ties.

    Rankings of different lengths get absent rows, of weight 0.

    Raises:
      ValueError: for a file that cannot be read, or a row that cannot be used (names file and line); an attribute that
        no row has; labels that are all of one class.
    """
    if kind not in READERS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(READERS)}")
    if unusable not in ("error", "drop"):
        raise ValueError(f"unusable is {unusable!r}; it must be error or drop")
    objects, digest = row_objects(path, "source file")
    groups, dropped = [], Counter[str]()
    for where, record in objects:
        try:
            rows = READERS[kind](named(record, columns or {}, kind, where), where, asked or Asked())
        except Tie as error:
            if unusable == "error":
                raise
            dropped["ties" if "a tie" in str(error) else "equal completions"] += 1
            continue
        said = stored_references(record, len(rows), where) or [None] * len(rows)
        groups.append([row._replace(where=where, reference=one) for row, one in zip(rows, said, strict=True)])
    if not groups:
        raise ValueError(
            f"{path} has {counted(len(objects), 'row')}, of which none is usable ({' and '.join(dropped)}); "
            "add usable rows"
        )
    most = max(map(len, groups))
    nothing = Judged("", "", {"rank": -1.0, "weight": 0.0})
    groups = [
        [*group, *[nothing._replace(prompt=group[0].prompt, where=group[0].where)] * (most - len(group))]
        for group in groups
    ]
    for place, name in enumerate((asked or Asked()).attributes):
        if all(np.isnan(group[0].values["rating"][place]) for group in groups):
            raise ValueError(
                f"no row of {path} has the rating {name!r}; its columns are {shown(sorted(objects[0][1]))}"
            )
    _require_both_classes(path, kind, groups)
    if len({row.reference is None for group in groups for row in group if row.values.get("weight") != 0}) > 1:
        raise ValueError(f"{path} has {STORED} in some rows only; give all rows the column, or none")
    return JudgedFile(groups, digest, dropped)


def _require_both_classes(path: str | Path, kind: Kind, groups: Sequence[Sequence[Judged]]) -> None:
    """Raises ValueError for labels, of rows or of steps, that are all on one side."""
    labels = [row.values["preferred"] for (row,) in groups] if kind == "labels" else []
    labels += [label for (row, *_) in groups for _, label in row.steps if label == label]
    if kind == "steps" and not labels:
        raise ValueError(f"{path} has no step with a label; give some of them")
    if labels and len({label > 0.5 for label in labels}) == 1:
        raise ValueError(
            f"{path} has only labels like {labels[0]:g}; training needs both classes, so add rows of the other class"
        )


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
    flipped: float = 0.0,
) -> Batches[WrittenBatch]:
    """Batches of whole groups, in a new order each epoch.

    Args:
      groups: from `judged_groups`.
      kind: of the file.
      tokenizer: text -> ids.
      groups_per_step: groups in a batch.
      max_prompt_tokens, max_completion_tokens: widths; a longer row is an error, or is dropped with its group.
      seed: of the orders.
      overlong: "error", or "drop" to drop and count groups.
      flipped: share of the pairs whose label is inverted, drawn by seed and row number, for studies of label noise.

    Raises:
      ValueError: for a completion that is too long, or fewer groups than a step needs.
    """
    kept, dropped = [], 0
    wrong = np.random.default_rng(seed).random(len(groups)) < flipped
    for number, group in enumerate(groups):
        rows = [encoded_completion(_flipped(row) if wrong[number] else row, number, tokenizer) for row in group]
        longest = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
        if longest[0] <= max_prompt_tokens and longest[1] <= max_completion_tokens:
            kept.append([_with_reference(*both, max_completion_tokens) for both in zip(group, rows, strict=True)])
        elif overlong == "drop":
            dropped += 1
        else:
            raise ValueError(
                f"{group[0].where} needs {longest[0]} prompt and {longest[1]} completion tokens, but the "
                f"limits are {max_prompt_tokens} and {max_completion_tokens}; raise them, or set data.overlong_prompts "
                "to drop"
            )
    known = {name: np.shape(value) for group in kept for row in group for name, value in row[2].items()}

    def batch(chosen: Sequence[Any]) -> WrittenBatch:
        rows = [row for group in chosen for row in group]
        count = len(rows)
        prompt_tokens = np.full((count, max_prompt_tokens), tokenizer.pad_id, np.int32)
        tokens = np.full((count, max_completion_tokens), tokenizer.pad_id, np.int32)
        absent = {name: _ABSENT.get(name, np.nan) for name in known}
        fields: dict[str, np.ndarray] = {
            name: np.full((count, *shape), absent[name], np.float32) for name, shape in known.items()
        }
        if kind == "steps":
            fields["step_labels"] = np.full((count, max_completion_tokens), np.nan, np.float32)
        for place, (prompt, completion, values, ends, _) in enumerate(rows):
            prompt_tokens[place, max_prompt_tokens - len(prompt) :] = prompt
            tokens[place, : len(completion)] = completion
            for end, label in ends:
                fields["step_labels"][place, min(end, len(completion)) - 1] = label
            for name, value in values.items():
                fields[name][place] = value
        return WrittenBatch(
            prompt_tokens,
            np.array([len(row[0]) for row in rows], np.int32),
            np.array([row[4] for row in rows], np.int32),
            tokens,
            np.array([len(row[1]) for row in rows], np.int32),
            fields,
        )

    return shuffled_batches(kept, dropped, batch, "groups_per_step", groups_per_step, seed)


# Neutral values of a row without the column: a margin of 0, a weight of 1.
_ABSENT = {"margin": 0.0, "weight": 1.0}


def _with_reference(row: Judged, encoded: Any, width: int) -> Any:
    """An encoded row with the log-probabilities that the file holds of it."""
    if row.reference is None:
        return encoded
    prompt, completion, values, *rest = encoded
    said = reference_row(row.reference, prompt, completion, width, row.where)
    return prompt, completion, {**values, STORED: said}, *rest


def _flipped(row: Judged) -> Judged:
    return row._replace(values={**row.values, "preferred": 1.0 - row.values["preferred"]})


def encoded_completion(
    row: Judged, number: int, tokenizer: Tokenizer
) -> tuple[list[int], list[int], Mapping[str, Any], list[tuple[int, float]], int]:
    """(prompt, completion, values, (end, label) of each step, number) of a row as token ids.

    The label of the last step is on its last token and on the end of sequence, where sampled solutions have it.

    Raises:
      ValueError: for a prompt that the tokenizer cannot encode; names file and line.
    """
    item: dict[str, Any] = {"body": row.prompt, "item_id": number}
    if not isinstance(row.prompt, str):
        item = {"body": row.prompt[-1]["content"], "messages": list(row.prompt), "item_id": number}
    try:
        prompt = list(tokenizer.prompt_ids(item))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    completion, ends, text = list(tokenizer.completion_ids(item, row.text)), [], ""
    for step, label in row.steps:
        text += step
        # The last token of a step is the last token of the text up to the end of the step.
        ends.append((len(tokenizer.encode(text)), label))
    ends += [(len(completion), row.steps[-1][1])] if row.steps else []
    return prompt, completion, row.values, ends, number
