"""Data sets of the user's own: rows of files -> records of the pipeline, with splits that never overlap.

Every row is read and checked before anything is trained on; what is wrong is named by file and line, and what is left
out is counted by its reason. Any format of `row_files` is read the same way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.data.final_answer import after_hashes, in_last_box, marked_answer
from jaxrl_llm.data.row_files import SPLITS, Row, rows_of, stored
from jaxrl_llm.data.row_templates import column_value, holds
from jaxrl_llm.data.tasks.items import record, require_choice, split_of

AnswerFrom = Literal["text", "hashes", "boxed", "marked"]
_ANSWERS: Mapping[str, Callable[[str], str | None]] = {
    "text": str.strip,
    "hashes": after_hashes,
    "boxed": in_last_box,
    "marked": marked_answer,
}
_CALCULATIONS = re.compile(r"<<[^<>]*>>")
_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class Fields:
    """Which columns of a row hold what. A dotted name goes into nested objects; `prompt`, `answer` and `response` may
    also be templates of jinja2, made of several columns: "{{ question }} {{ options | join(', ') }}".

    Attributes:
      prompt: text of the prompt; None where `messages` holds it.
      messages: a conversation of objects with `role` and `content`; a last turn of the assistant is the reference
        completion, everything before it the prompt. None where `prompt` holds the prompt.
      answer: reference answer, a text or a number; None takes the last turn of the assistant in `messages`, and with
        `prompt` says that there are none. Where no line has a field of the default name there are none either.
      response: reference completion for supervised steps; None where there is none, or `messages` holds it.
      answer_from: where the final answer stands in the answer field: "text" is all of it, "hashes" what stands behind
        `####`, "boxed" what stands in the last box, "marked" what stands behind the last mark of either kind.
      calculations: "remove" takes calculator annotations such as <<3+4=7>> out of reference completions.
    """

    prompt: str | None = "prompt"
    messages: str | None = None
    answer: str | None = "answer"
    response: str | None = None
    answer_from: AnswerFrom = "text"
    calculations: Literal["keep", "remove"] = "keep"

    def __post_init__(self) -> None:
        require_choice("answer_from", self.answer_from, tuple(_ANSWERS))
        require_choice("calculations", self.calculations, ("keep", "remove"))
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(
                f"prompt is {self.prompt!r} and messages is {self.messages!r}; name the field that holds the prompt, "
                "and set the other to null"
            )
        if self.response is not None and self.messages is not None:
            raise ValueError(
                f"response is {self.response!r}, but with messages the last turn of the assistant is the reference "
                "completion; leave response out"
            )


FORMATS: Mapping[str, Fields] = {
    "gsm8k": Fields(prompt="question", answer="answer", response="answer", answer_from="hashes", calculations="remove"),
    "prompt": Fields(),
    "messages": Fields(prompt=None, messages="messages"),
}


@dataclass(frozen=True)
class Refining:
    """Which rows of a data set become problems; what is left out is counted.

    Attributes:
      where: conditions on the columns that rows have to meet, expressions of jinja2 such as "level|int < 3"; `body`,
        `answer` and `response` are columns, too.
      limit: training problems at most, the first ones; None takes all.
      duplicates: "keep", or "drop" for prompts that an earlier row of the split has.
      overlap: of splits: "error", "drop" for prompts of a split that stand in one that is measured on, or "keep".
      unusable: rows without a prompt or an answer that can be read: "error", or "drop".
    """

    where: tuple[str, ...] = ()
    limit: int | None = None
    duplicates: Literal["keep", "drop"] = "keep"
    overlap: Literal["error", "drop", "keep"] = "error"
    unusable: Literal["error", "drop"] = "error"


@dataclass(frozen=True)
class ProblemSet(Sequence[dict[str, Any]]):
    """Records of one split, read by index as from `DataSet`.

    A record has `item_id` (number of its row, from 0), `body` (text of the prompt), `answer` and `response` (reference
    completion), "" where there is none, `messages` (the prompt's conversation, where the rows have one), `raw` (the
    row, whose columns are there for rewards), in a mixture `data_source` (name of its source), and `prefix` (solved
    examples before the prompt) where there are any.

    Attributes:
      path: where they come from.
      split: "train", "validation" or "test".
      records: the records.
      fingerprint: hash over the content, how it was read, and the split, for checkpoints.
      dropped: rows that were left out, by reason.
      weights: of a mixture: name of a source -> its share of the prompts of a step, up to a factor; empty where all
        records come equally often.
    """

    path: str
    split: str
    records: tuple[dict[str, Any], ...]
    fingerprint: str
    dropped: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self.records[index] for index in indices]


def fields_of(format: str, **changes: Any) -> Fields:
    """The fields of a named format, with changes.

    Args:
      format: "gsm8k", "prompt" or "messages", see `FORMATS`.
      **changes: attributes of `Fields`.

    Raises:
      ValueError: for an unknown format or attribute, or fields that contradict each other.

    >>> fields_of("prompt", prompt="problem", answer="solution", answer_from="boxed").prompt
    'problem'
    """
    require_choice("format", format, tuple(FORMATS))
    unknown = sorted(changes.keys() - asdict(FORMATS[format]).keys())
    if unknown:
        raise ValueError(f"there is no field {unknown[0]!r} to map; known: {', '.join(asdict(FORMATS[format]))}")
    return replace(FORMATS[format], **changes)


def problem_sets(
    path: str | Path,
    fields: Fields,
    *,
    validation_path: str | Path | None = None,
    test_path: str | Path | None = None,
    refining: Refining = Refining(),
) -> dict[str, ProblemSet]:
    """The three splits of a user's data.

    A split with a path of its own is that; one that the data set of `path` has by name is taken from there. Any other
    is cut out of `path` by the hash of the prompt (8 of 10 train, 1 validation, 1 test), so that it stays the same when
    rows are added or moved, and equal prompts share a split.

    Args:
      path: training data, and whatever has no path of its own; see `row_files`.
      fields: which columns hold what.
      validation_path: of the validation split.
      test_path: of the test split.
      refining: which rows are taken.

    Raises:
      ValueError: for data that are missing, rows that cannot be used (named), a split without any row, or a prompt
        that stands in two splits.
    """
    found, named = stored(path)
    read = {"train": _kept(f"{path}", *found.rows(named or "train"), fields, refining)}
    places = {"train": str(path)}
    for split, own in (("validation", validation_path), ("test", test_path)):
        if own is not None:
            other, of_it = stored(own)
            read[split] = _kept(str(own), *other.rows(of_it or split), fields, refining)
            places[split] = str(own)
        elif named is None and (name := found.own(split)):
            read[split] = _kept(f"{path}@{name}", *found.rows(name), fields, refining)
            places[split] = f"{path}@{name}"
    cut = [split for split in SPLITS if split not in read]
    sets = {}
    for split in SPLITS:
        file, (records, digest, dropped) = places.get(split, places["train"]), read.get(split, read["train"])
        if split in cut:
            records = [each for each in records if split_of(_prompt_key(each)) == split]
        elif split == "train":
            records = [each for each in records if split_of(_prompt_key(each)) not in cut]
        if not records:
            raise ValueError(
                f"no line of {file} falls into the {split} split, which is cut out of it by hash; add lines, or name a "
                f"file of its own for this split"
                if not dropped
                else f"no row of {file} is left for the {split} split: {sum(dropped.values())} were left out "
                f"({', '.join(dropped)}); take conditions out, or give more rows"
            )
        print_of = [digest, asdict(fields), split, cut if split in cut or split == "train" else []]
        if refining != Refining():
            print_of.append(asdict(refining))
        fingerprint = hashlib.sha256(json.dumps(print_of).encode()).hexdigest()
        of_file = dropped if split not in cut else {}
        sets[split] = ProblemSet(file, split, tuple(records), fingerprint, dict(of_file))
    return _limited(_disjoint(_distinct(sets, refining), refining), refining)


def _kept(
    path: str, rows: Sequence[Row], digest: str, fields: Fields, refining: Refining
) -> tuple[list[dict[str, Any]], str, dict[str, int]]:
    """(records of the rows that are taken, hash of them all, what was left out by reason)."""
    records, problems = _records(rows, fields)
    if refining.unusable == "error":
        _require_usable(path, records, problems)
    dropped = {"no prompt or answer that can be read": len(problems)} if problems else {}
    for condition in refining.where:
        met = []
        for each in records:
            try:
                if holds(condition, each | each["raw"]):
                    met.append(each)
            except ValueError as error:
                raise ValueError(f"row {each['item_id'] + 1} of {path}: the condition {error}") from None
        if len(met) < len(records):
            dropped[f"not {condition}"] = len(records) - len(met)
        records = met
    return records, digest, dropped


def _distinct(sets: dict[str, ProblemSet], refining: Refining) -> dict[str, ProblemSet]:
    if refining.duplicates == "keep":
        return sets
    return {
        split: _left(one, "duplicate prompt", {_prompt_key(each): each["item_id"] for each in reversed(one.records)})
        for split, one in sets.items()
    }


def _left(one: ProblemSet, reason: str, first: Mapping[str, int]) -> ProblemSet:
    """Without records whose prompt another record stands for; `first` says which."""
    kept = tuple(each for each in one.records if first.get(_prompt_key(each), each["item_id"]) == each["item_id"])
    gone = len(one.records) - len(kept)
    return replace(one, records=kept, dropped=one.dropped | {reason: gone}) if gone else one


def _disjoint(sets: dict[str, ProblemSet], refining: Refining) -> dict[str, ProblemSet]:
    if refining.overlap == "keep":
        return sets
    if refining.overlap == "error":
        _require_disjoint(sets)
        return sets
    found, measured = dict(sets), {}
    for split in reversed(SPLITS):
        found[split] = _left(sets[split], "prompt of another split", measured)
        measured |= dict.fromkeys(map(_prompt_key, sets[split].records), -1)
        if not found[split].records:
            raise ValueError(f"every prompt of {sets[split].path} ({split}) stands in another split; give others")
    return found


def _limited(sets: dict[str, ProblemSet], refining: Refining) -> dict[str, ProblemSet]:
    train, limit = sets["train"], refining.limit
    if limit is None or len(train) <= limit:
        return sets
    dropped = train.dropped | {f"beyond the limit of {limit}": len(train) - limit}
    return sets | {"train": replace(train, records=train.records[:limit], dropped=dropped)}


def read_records(
    file: str | Path, fields: Fields, *, prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """All records of a data set, and the hash of its content.

    Args:
      file: see `row_files`.
      fields: which columns hold what.
      prepare: from a row to the one that `fields` are read of; `raw` of the record is the row itself.

    Raises:
      ValueError: for data that are missing or empty, and rows that cannot be used, named.
    """
    rows, digest = rows_of(file)
    records, problems = _records(rows, fields, prepare)
    _require_usable(str(file), records, problems)
    return records, digest


def _records(
    rows: Sequence[Row], fields: Fields, prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """(records, what is wrong with the other rows)."""
    records, problems = [], []
    if (
        prepare is None
        and fields.messages is None
        and fields.answer == "answer"
        and not any(_has(row.columns, fields.answer) for row in rows)
    ):
        fields = replace(fields, answer=None)
    for number, where, element in rows:
        try:
            prepared = prepare(element) if prepare is not None and isinstance(element, dict) else element
            records.append(record(_record(prepared, fields) | {"item_id": number - 1, "raw": element}, number - 1))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return records, problems


def _require_usable(path: str, records: Sequence[Any], problems: Sequence[str]) -> None:
    """Raises ValueError where rows cannot be used, or there are none."""
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = [*problems[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError(
            f"{path} has {len(problems)} lines that cannot be used; repair them: {'; '.join(shown)} "
            "(data.unusable=drop leaves such lines out)"
        )
    if not records:
        raise ValueError(f"data file {path} holds no line; give a file with one row or more")


def _record(element: Any, fields: Fields) -> dict[str, Any]:
    """A row as a record without its number."""
    if isinstance(element, ValueError):
        raise element
    if not isinstance(element, dict):
        raise ValueError(f"holds a {type(element).__name__}, not an object with fields")
    if fields.messages is None:
        prompt, said = {"body": _text(element, fields.prompt)}, ""
    else:
        prompt, said = _conversation(column_value(element, fields.messages), fields.messages)
    written = said if fields.answer is None else _text(element, fields.answer)
    answer = _ANSWERS[fields.answer_from](written)
    answerless = fields.answer is None and (fields.messages is None or not said)
    if not answer and not answerless:
        where = "the last turn of the assistant" if fields.answer is None else f"field {fields.answer!r}"
        raise ValueError(
            f"{where} holds no answer (answer_from is {fields.answer_from!r}): it ends with {written[-60:]!r}"
        )
    response = said if fields.response is None else _text(element, fields.response)
    if fields.calculations == "remove":
        response = _CALCULATIONS.sub("", response)
    return prompt | {"answer": answer or "", "response": response, "raw": element}


def _conversation(turns: Any, name: str) -> tuple[dict[str, Any], str]:
    """The prompt's part of a record, and what the assistant says in the end ("" where the file does not say)."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"field {name!r} holds no list of messages")
    for number, turn in enumerate(turns):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise ValueError(f"message {number} of field {name!r} is no object with a role and a content of text")
    prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
    if not asked or not asked[-1].strip():
        raise ValueError(f"field {name!r} holds no message of the user that an assistant could answer")
    return {"body": asked[-1], "messages": prompt}, turns[-1]["content"] if len(prompt) < len(turns) else ""


def _text(element: Mapping[str, Any], name: str | None) -> str:
    """A column that holds text, or a number as it is written; or a template of several."""
    value = column_value(element, name or "")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"field {name!r} holds {json.dumps(value)[:60]}, not text or a number")
    if not str(value).strip():
        raise ValueError(f"field {name!r} is empty")
    return str(value)


def _has(element: Any, name: str | None) -> bool:
    try:
        return name is not None and isinstance(element, Mapping) and column_value(element, name) is not None
    except ValueError:
        return False


def _prompt_key(item: Mapping[str, Any]) -> str:
    """What makes two prompts the same: the text, or the whole conversation."""
    return json.dumps(item["messages"], sort_keys=True) if "messages" in item else item["body"]


def _require_disjoint(sets: Mapping[str, ProblemSet]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for split in SPLITS:
        held = {_prompt_key(item): (split, item["item_id"] + 1) for item in sets[split].records}
        for key in held.keys() & seen.keys():
            other, line = seen[key]
            raise ValueError(
                f"the prompt {key[:80]!r} stands in line {line} of {sets[other].path} ({other}) and in line "
                f"{held[key][1]} of {sets[split].path} ({split}); splits must not overlap: take it out of one"
            )
        seen |= held
