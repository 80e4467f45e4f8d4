"""Rows of the user's own -> records of the pipeline: which columns hold what.

Every row is read and checked before anything is trained on; what is wrong is named by file and line. Any format of
`row_files` is read the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.bounds import shortened
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
        raise ValueError(f"there is no field {unknown[0]!r} to map; known: {', '.join(asdict(FORMATS[format]))}")
    return replace(FORMATS[format], **changes)


# What the pipeline reads of a record: a column of the file that is called so stays in `raw`.
_READ_OF_RECORDS = frozenset({"body", "messages", "prefix", "item_id", "raw", "data_source"})


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
    records, problems = records_of(rows, fields, prepare)
    require_usable(str(file), records, problems)
    return records, digest


def records_of(
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
            records.append(_with_columns(_record(prepared, fields), element, number - 1))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return records, problems


def require_usable(path: str, records: Sequence[Any], problems: Sequence[str]) -> None:
    """Raises ValueError where rows cannot be used, or there are none."""
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = [
            *(shortened(each, 240) for each in problems[:_MOST_PROBLEMS]),
            *([f"and {more} more"] if more > 0 else []),
        ]
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


def _with_columns(read: dict[str, Any], row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A whole record: what was read of a row, and its further columns by their names, which hide defaults (`level`)."""
    own = {name: value for name, value in row.items() if name not in _READ_OF_RECORDS and name not in read}
    return record(read | {"item_id": number, "raw": row}, number) | own


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
