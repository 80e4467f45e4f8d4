"""A handbook: short named instructions; each problem gets the ones that match it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxrl_llm.data.row_files import row_objects
from jaxrl_llm.data.splits import ProblemSet, with_made_column
from jaxrl_llm.data.tasks.items import own_columns


class Entry(NamedTuple):
    """An instruction.

    Attributes:
      name: short, unique in a handbook.
      instruction: one line.
      tag: its subject; empty for none.
    """

    name: str
    instruction: str
    tag: str = ""


def written_entries(text: str) -> list[Entry]:
    r"""The entries that a model has written, one per line `name: instruction`; other lines are ignored.

    >>> written_entries("I would note:\ncheck units: write the unit beside each number\n\n")
    [Entry(name='check units', instruction='write the unit beside each number', tag='')]
    """
    parts = [line.partition(":") for line in text.splitlines()]
    return [Entry(name.strip(), rest.strip()) for name, colon, rest in parts if colon and name.strip() and rest.strip()]


def unique(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The first entry of each name."""
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.name, entry)
    return tuple(first.values())


def read_handbook(path: str) -> tuple[Entry, ...]:
    """The entries of a file whose rows have `name`, `instruction` and perhaps `tag`; the first of each name is kept.

    Raises:
      ValueError: for a row without a name or an instruction; names file and line.
    """
    entries = []
    for where, row in row_objects(path, "handbook")[0]:
        for key in ("name", "instruction"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{where}: a row of a handbook needs a text {key!r}; it has {sorted(row)}")
        entries.append(Entry(row["name"], row["instruction"], str(row.get("tag") or "")))
    return unique(entries)


def nearest_entries(query: Float[np.ndarray, "D"], entries: Float[np.ndarray, "N D"], count: int) -> list[int]:
    """Indices of the entries with the largest cosine to a query, at most `count`; ties go to the first. A zero vector
    matches none.

    >>> nearest_entries(np.array([1.0, 1, 0]), np.array([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 2, 0]]), 3)
    [1, 0, 3]

    Reference: metacognitive reuse (2509.13237).
    Certainty: recalled
    """
    sizes, size = np.linalg.norm(entries, axis=1), np.linalg.norm(query)
    if size == 0:
        return []
    cosine = entries @ query / np.where(sizes == 0, 1.0, sizes * size)
    order = np.argsort(-cosine.round(12), kind="stable")
    return [int(number) for number in order if sizes[number] > 0][:count]


def chooser(entries: Sequence[Entry], *, count: int, by: str) -> Callable[[Mapping[str, Any]], list[Entry]]:
    """The function from a problem's record to its entries.

    Args:
      entries: the handbook.
      count: largest number of entries.
      by: "similarity" the nearest by the cosine of word counts; "mention" those whose name occurs in the problem, in
        the order of the handbook; otherwise the name of a column of the record, whose value must equal their tag.

    Raises:
      ValueError: from the returned function, for a column that the record does not have.

    Reference: metacognitive reuse (2509.13237).
    Certainty: recalled
    """
    if by == "mention":
        return lambda item: [entry for entry in entries if entry.name in item["body"]][:count]
    if by == "similarity":
        texts = [_words(f"{entry.name} {entry.instruction}") for entry in entries]
        known = {word: number for number, word in enumerate(sorted({word for text in texts for word in text}))}
        vectors = np.stack([_counts(text, known) for text in texts])
        return lambda item: [
            entries[number] for number in nearest_entries(_counts(_words(item["body"]), known), vectors, count)
        ]

    def of_tag(item: Mapping[str, Any]) -> list[Entry]:
        columns = own_columns(item)
        if by not in columns:
            raise ValueError(f"data.handbook.by is {by!r}, which is not a column; columns are {sorted(columns)}")
        return [entry for entry in entries if entry.tag == str(columns[by])][:count]

    return of_tag


def with_handbook(
    sets: Mapping[str, Sequence[dict[str, Any]]],
    entries: Mapping[str, str],
    path: str | None = None,
    *,
    count: int = 40,
    by: str = "similarity",
    line: str = "{name}: {instruction}\n",
) -> dict[str, ProblemSet]:
    """Problems with the column `handbook`: the lines of its entries; empty if none matches.

    Args:
      sets: splits.
      entries: name -> instruction.
      path: of a file with further entries.
      count, by: as for `chooser`.
      line: text of an entry, with {name} and {instruction}.

    Raises:
      ValueError: as for `read_handbook` and `chooser`.
    """
    own = [Entry(name, instruction) for name, instruction in entries.items()]
    book = unique([*own, *(read_handbook(path) if path is not None else ())])
    chosen = chooser(book, count=count, by=by)

    def text(item: Mapping[str, Any]) -> str:
        return "".join(line.replace("{instruction}", e.instruction).replace("{name}", e.name) for e in chosen(item))

    return with_made_column(sets, "handbook", text, f"{book} {count} {by} {line}")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _counts(words: Sequence[str], known: Mapping[str, int]) -> Float[np.ndarray, "D"]:
    found = np.zeros(len(known))
    for word in words:
        if word in known:
            found[known[word]] += 1.0
    return found
