"""Data sets of the user's own: a local JSONL or JSON file -> records of the pipeline, with splits that never overlap.

Every line is read and checked before anything is trained on; what is wrong is named by file and line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.bounds import shortened, shown
from jaxrl_llm.data.final_answer import after_hashes, in_last_box, marked_answer
from jaxrl_llm.data.json_files import contents, elements, place
from jaxrl_llm.data.tasks.items import record, require_choice, split_of

SPLITS = ("train", "validation", "test")
AnswerFrom = Literal["text", "hashes", "boxed", "marked"]
_ANSWERS: Mapping[str, Callable[[str], str | None]] = {
    "text": str.strip,
    "hashes": after_hashes,
    "boxed": in_last_box,
    "marked": marked_answer,
}
_CALCULATIONS = re.compile(r"<<[^<>]*>>")
_MOST_SHOWN, _MOST_PROBLEMS = 5, 20


@dataclass(frozen=True)
class Fields:
    """Which fields of a line hold what. A dotted name goes into nested objects.

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
class JsonlDataSet(Sequence[dict[str, Any]]):
    """Records of one split, read by index as from `DataSet`.

    A record has `item_id` (number of its line, from 0), `body` (text of the prompt), `answer` and `response` (reference
    completion), "" where there is none, `messages` (the prompt's conversation, where the file has one) and `raw` (the
    line's object, whose fields are columns for rewards).

    Attributes:
      path: the file.
      split: "train", "validation" or "test".
      records: the records.
      fingerprint: hash over the file's content, how it was read, and the split, for checkpoints.
    """

    path: str
    split: str
    records: tuple[dict[str, Any], ...]
    fingerprint: str

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


def jsonl_data_sets(
    path: str | Path,
    fields: Fields,
    *,
    validation_path: str | Path | None = None,
    test_path: str | Path | None = None,
) -> dict[str, JsonlDataSet]:
    """The three splits of a user's files.

    A split with a file of its own is that file. One without is cut out of `path` by the hash of the prompt (8 of 10
    train, 1 validation, 1 test), so that it stays the same when lines are added or moved, and equal prompts share a
    split.

    Args:
      path: training data, and whatever has no file of its own.
      fields: which fields hold what.
      validation_path: file of the validation split.
      test_path: file of the test split.

    Raises:
      ValueError: for a file that is missing, lines that cannot be used (named), a split without any line, or a prompt
        that stands in two splits.
    """
    own = {"validation": validation_path, "test": test_path}
    files = {"train": Path(path)} | {split: Path(file) for split, file in own.items() if file is not None}
    read = {split: read_records(file, fields) for split, file in files.items()}
    cut = [split for split in SPLITS if split not in files]
    sets = {}
    for split in SPLITS:
        file, (records, digest) = files.get(split, files["train"]), read.get(split, read["train"])
        if split in cut:
            records = [each for each in records if split_of(_prompt_key(each)) == split]
        elif split == "train":
            records = [each for each in records if split_of(_prompt_key(each)) not in cut]
        if not records:
            raise ValueError(
                f"no line of {file} falls into the {split} split, which is cut out of it by hash; add lines, or name a "
                f"file of its own for this split"
            )
        print_of = json.dumps([digest, asdict(fields), split, cut if split in cut or split == "train" else []])
        sets[split] = JsonlDataSet(str(file), split, tuple(records), hashlib.sha256(print_of.encode()).hexdigest())
    _require_disjoint(sets)
    return sets


def read_records(
    file: Path, fields: Fields, *, prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """All records of a file, and the hash of its content.

    Args:
      file: a JSONL file, or a JSON file that is one list.
      fields: which fields hold what.
      prepare: from a line's object to the one that `fields` are read of; `raw` of the record is the line's.

    Raises:
      ValueError: for a file that is missing or empty, and lines that cannot be used, named.
    """
    content = contents(file, "data file")
    numbered: list[tuple[int, Any]] = []
    problems: list[tuple[int, ValueError]] = []
    for number, element in elements(file, content):
        if isinstance(element, ValueError):
            problems.append((number, ValueError(f"no JSON: {element}")))
        else:
            numbered.append((number, element))
        if len(problems) == _MOST_PROBLEMS:
            raise _unusable(file, content, problems)
    if (
        prepare is None
        and fields.messages is None
        and fields.answer == "answer"
        and not any(_has(element, fields.answer) for _, element in numbered)
    ):
        fields = replace(fields, answer=None)
    records = []
    for number, element in numbered:
        try:
            prepared = prepare(element) if prepare is not None and isinstance(element, dict) else element
            records.append(_record(prepared, fields) | {"item_id": number - 1, "raw": element})
        except ValueError as error:
            problems.append((number, error))
        if len(problems) == _MOST_PROBLEMS:
            break
    if problems:
        raise _unusable(file, content, problems)
    if not records:
        raise ValueError(f"data file {file} holds no line; give a file with one JSON object a line")
    return [record(each, each["item_id"]) for each in records], hashlib.sha256(content).hexdigest()


def _unusable(file: Path, content: bytes, problems: Sequence[tuple[int, ValueError]]) -> ValueError:
    """What is wrong with a file; of many lines the first ones, and at least how many there are."""
    told = [
        f"{place(content)} {number}: {shortened(str(error), 240)}"
        for number, error in sorted(problems, key=lambda p: p[0])
    ]
    more = len(told) - _MOST_SHOWN
    first = told[:_MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    count = f"{len(told)} lines or more" if len(told) >= _MOST_PROBLEMS else f"{len(told)} lines"
    return ValueError(f"{file} has {count} that cannot be used; repair them: " + "; ".join(first))


def _record(element: Any, fields: Fields) -> dict[str, Any]:
    """A line's object as a record without its number."""
    if not isinstance(element, dict):
        raise ValueError(f"holds a {type(element).__name__}, not an object with fields")
    if fields.messages is None:
        prompt, said = {"body": _text(element, fields.prompt)}, ""
    else:
        prompt, said = _conversation(_found(element, fields.messages), fields.messages)
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
    """A field that holds text, or a number as it is written."""
    value = _found(element, name or "")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"field {name!r} holds {json.dumps(value)[:60]}, not text or a number")
    if not str(value).strip():
        raise ValueError(f"field {name!r} is empty")
    return str(value)


def _has(element: Any, name: str | None) -> bool:
    try:
        return name is not None and isinstance(element, Mapping) and _found(element, name) is not None
    except ValueError:
        return False


def _found(element: Mapping[str, Any], name: str) -> Any:
    """The value of a field; a name with dots goes into nested objects unless a field has just this name."""
    if name in element:
        return element[name]
    outer, dot, inner = name.partition(".")
    if dot and isinstance(element.get(outer), dict):
        return _found(element[outer], inner)
    raise ValueError(f"there is no field {name!r}; its fields are {shown(sorted(map(str, element)))}")


def _prompt_key(item: Mapping[str, Any]) -> str:
    """What makes two prompts the same: the text, or the whole conversation."""
    return json.dumps(item["messages"], sort_keys=True) if "messages" in item else item["body"]


def _require_disjoint(sets: Mapping[str, JsonlDataSet]) -> None:
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
