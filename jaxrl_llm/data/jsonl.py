"""Rows of a user's data set -> records of the pipeline, by a mapping of columns.

All rows are read and checked before training; messages name file and line. The rows may have any format of `row_files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.bounds import counted, shortened
from jaxrl_llm.data.final_answer import after_hashes, in_last_box, marked_answer
from jaxrl_llm.data.row_files import Row, rows_of
from jaxrl_llm.data.row_templates import column_value
from jaxrl_llm.data.tasks.items import record, require_choice

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
    """The columns of prompt, answer and reference completion in a row.

    A dotted name is a path in nested objects. `prompt`, `answer` and `response` may also be templates of jinja2 with
    several columns: "{{ question }} {{ options | join(', ') }}".

    Attributes:
      prompt: text of the prompt; None if it is in `messages`.
      messages: a conversation of objects with `role` and `content`; a last turn of the assistant is the reference
        completion, and the turns before it are the prompt. None if the prompt is in `prompt`.
      answer: reference answer, a text or a number. None takes the last turn of the assistant in `messages`; with
        `prompt`, None means that there are no answers, as does a default name that no row has.
      response: reference completion for supervised steps; None if there is none, or it is in `messages`.
      answer_from: the part of the answer column that is the final answer: "text" is all of it, "hashes" the text after
        `####`, "boxed" the content of the last box, "marked" the text at the last mark of either kind.
      calculations: "remove" removes calculator annotations such as <<3+4=7>> from reference completions.
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
                f"prompt is {self.prompt!r} and messages is {self.messages!r}; set one of them to the column of the "
                "prompt, and the other to null"
            )
        if self.response is not None and self.messages is not None:
            raise ValueError(
                f"response is {self.response!r}, but with messages the last turn of the assistant is the reference "
                "completion; remove response"
            )


FORMATS: Mapping[str, Fields] = {
    "gsm8k": Fields(prompt="question", answer="answer", response="answer", answer_from="hashes", calculations="remove"),
    "prompt": Fields(),
    "messages": Fields(prompt=None, messages="messages"),
}


def fields_of(format: str, /, **changes: Any) -> Fields:
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
        raise ValueError(f"there is no field {unknown[0]!r} to map; fields are {', '.join(asdict(FORMATS[format]))}")
    return replace(FORMATS[format], **changes)


# Keys of a record that the pipeline uses; a column of the file with such a name is only in `raw`.
_READ_OF_RECORDS = frozenset({"body", "messages", "prefix", "item_id", "raw", "row_of_file", "data_source"})


def read_records(
    file: str | Path, fields: Fields, *, prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """All records of a data set, and the hash of its content.

    Args:
      file: see `row_files`.
      fields: the columns to read.
      prepare: changes a row before `fields` are read from it; `raw` of the record is the unchanged row.

    Raises:
      ValueError: for missing or empty data, and rows that cannot be used; names the rows.
    """
    rows, digest = rows_of(file)
    records, problems = records_of(str(file), rows, fields, prepare)
    require_usable(str(file), records, problems)
    return records, digest


def records_of(
    path: str,
    rows: Sequence[Row],
    fields: Fields,
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(records, one message for each row that cannot be used); `row_of_file` of a record names its row and `path`."""
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
            read = _record(prepared, fields) | {"row_of_file": f"{where} of {path}"}
            records.append(_with_columns(read, element, number - 1))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return records, problems


def require_usable(path: str, records: Sequence[Any], problems: Sequence[str]) -> None:
    """Raises ValueError if some rows cannot be used, or there are no rows."""
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = [
            *(shortened(each, 240) for each in problems[:_MOST_PROBLEMS]),
            *([f"and {more} more"] if more > 0 else []),
        ]
        raise ValueError(
            f"{path} has {counted(len(problems), 'line')} that cannot be used; repair "
            f"{'it' if len(problems) == 1 else 'them'}: {'; '.join(shown)} (data.unusable=drop drops such lines)"
        )
    if not records:
        raise ValueError(f"data file {path} has no rows; give a file with at least one row")


def _record(element: Any, fields: Fields) -> dict[str, Any]:
    """The record of a row, without its number."""
    if isinstance(element, ValueError):
        raise element
    if not isinstance(element, dict):
        raise ValueError(f"has a {type(element).__name__}, not an object with fields")
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
            f"{where} has no answer (answer_from is {fields.answer_from!r}): it ends with {written[-60:]!r}"
        )
    response = said if fields.response is None else _text(element, fields.response)
    if fields.calculations == "remove":
        response = _CALCULATIONS.sub("", response)
    return prompt | {"answer": answer or "", "response": response, "raw": element}


def _with_columns(read: dict[str, Any], row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A complete record with the further columns of the row, which replace defaults such as `level`."""
    own = {name: value for name, value in row.items() if name not in _READ_OF_RECORDS and name not in read}
    return record(read | {"item_id": number, "raw": row}, number) | own


def _conversation(turns: Any, name: str) -> tuple[dict[str, Any], str]:
    """The prompt of a record, and the last turn of the assistant ("" if the conversation has none)."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"field {name!r} is not a list of messages")
    for number, turn in enumerate(turns):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise ValueError(f"message {number} of field {name!r} is not an object with texts as role and content")
    prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
    if not asked or not asked[-1].strip():
        raise ValueError(f"field {name!r} has no message of the user for the assistant to answer")
    return {"body": asked[-1], "messages": prompt}, turns[-1]["content"] if len(prompt) < len(turns) else ""


def _text(element: Mapping[str, Any], name: str | None) -> str:
    """The text of a column (a number as written), or a rendered template of several columns."""
    value = column_value(element, name or "")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"field {name!r} is {json.dumps(value)[:60]}, not text or a number")
    if not str(value).strip():
        raise ValueError(f"field {name!r} is empty")
    return str(value)


def _has(element: Any, name: str | None) -> bool:
    try:
        return name is not None and isinstance(element, Mapping) and column_value(element, name) is not None
    except ValueError:
        return False
