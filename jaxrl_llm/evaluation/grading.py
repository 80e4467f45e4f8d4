"""Graders decide on the host whether a completion is right, and which answer it votes for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from jaxrl_llm.data import Item, Task
from jaxrl_llm.data.final_answer import marked_answer
from jaxrl_llm.data.tasks.items import defaults_of, named_item, own_columns
from jaxrl_llm.rewards import extract_number, parsed_number

# (record, completion) -> `Grade`, or its first two entries. Every right answer votes for the reference answer, so that
# different spellings do not split the vote.
Grader = Callable[[Mapping[str, Any], str], tuple]
Verifier = Literal["number", "text"]


class Grade(NamedTuple):
    """The grade of one completion.

    Attributes:
      right: whether it counts as right.
      answer: the answer that it votes for; None without an answer.
      score: a number for graded correctness; None: 1 or 0.
      confidence: the stated probability in [0, 1] that the answer is right; None if none is stated.
    """

    right: bool
    answer: str | None = None
    score: float | None = None
    confidence: float | None = None


class GraderError(ValueError):
    """A user's grader failed, or returned an invalid grade."""


def task_grader(task: Task) -> Grader:
    """A grader with the task's own verifier, for the answer of a completion or the moves of a conversation."""

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        item = Item(**{name: record[name] for name in Item.__dataclass_fields__})
        said = task.said(completion)
        right = task.verify(item, said) >= 1.0
        return right, item.answer if right else said

    return grade


def number_grader() -> Grader:
    """A grader that compares the completion's final number with the reference answer, as rational numbers (see
    `number_match`).

    >>> number_grader()({"answer": "18"}, "so that makes $18.00."), number_grader()({"answer": "18"}, "1 or 2")
    ((True, '18'), (False, '2'))
    """

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        said = extract_number(completion)
        number = None if said is None else parsed_number(said)
        right = number is not None and number == parsed_number(record["answer"])
        return right, record["answer"] if right else None if number is None else str(number)

    return grade


def text_grader() -> Grader:
    """A grader that compares the marked answer (boxed, or after `####`), or else the whole completion, with the
    reference answer as text.

    >>> text_grader()({"answer": "B"}, "It must be #### B"), text_grader()({"answer": "B"}, " A ")
    ((True, 'B'), (False, 'A'))
    """

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        marked = marked_answer(completion)
        said = (completion if marked is None else marked).strip()
        return said == record["answer"].strip(), said or None

    return grade


def function_grader(function: Callable[..., Any], *, name: str = "") -> Grader:
    """A grader from a user's function.

    Its parameters are data by name: `completion`, `answer` (the reference answer), `prompt`, `item` (the whole record),
    or a column of the data. A parameter with a default keeps it if the data has no such column; the plural of the first
    four is a list of one. It may be `async def`.

    It returns a boolean, a score (right if at least 1), a pair (boolean or score, voted answer), or a dictionary with
    `right` or `score`, and optionally `answer` and `confidence`.

    >>> def near(completion, answer, tolerance=1.0):
    ...     return abs(float(completion) - float(answer)) <= tolerance
    >>> function_grader(near)({"body": "2+2?", "answer": "4", "tolerance": 0.5}, "4.25")
    Grade(right=True, answer='4', score=None, confidence=None)

    Raises:
      GraderError: from the grader, for an exception in the function or an invalid grade.
    """
    called = name or getattr(function, "__name__", "grader")
    parameters = inspect.signature(function).parameters.values()
    named = [each for each in parameters if each.kind is not each.VAR_KEYWORD]
    everything = len(named) < len(list(parameters))

    def grade(record: Mapping[str, Any], completion: str) -> Grade:
        given = grader_arguments(record, completion)
        arguments = given if everything else {each.name: given[each.name] for each in named if each.name in given}
        try:
            value = function(**arguments)
            value = asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value
            return _grade(value, record)
        except Exception as error:
            raise GraderError(
                f"grader {called!r} failed at {named_item(record)} ({str(record.get('body'))[:60]!r}) with "
                f"{type(error).__name__}: {error}; the completion was {completion[:80]!r}. Catch the case in the "
                "function, and return the grade that such a completion should get"
            ) from error

    return grade


def grader_arguments(record: Mapping[str, Any], completion: str) -> dict[str, Any]:
    """The data that a user's grader can read."""
    single = {"completion": completion, "answer": record["answer"], "prompt": record["body"], "item": dict(record)}
    own = {name: value for name, value in record.items() if name not in defaults_of(record)}
    return {**own, **record.get("raw", {}), **single} | {f"{key}s": [value] for key, value in single.items()}


def require_columns(function: Callable[..., Any], records: Iterable[Mapping[str, Any]], name: str) -> None:
    """Raise ValueError, before sampling, for a grader with a parameter that the data does not have.

    Raises:
      ValueError: naming the parameter and the first record without it.
    """
    wanted = [
        each.name
        for each in inspect.signature(function).parameters.values()
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    for record in records:
        given = grader_arguments(record, "")
        if missing := [each for each in wanted if each not in given]:
            raise ValueError(
                f"grader {name!r} names {missing[0]!r}, but {named_item(record)} has only the columns "
                f"{', '.join(sorted(own_columns(record))) or 'none'}; name one of these, or completion, answer, "
                "prompt, item"
            )


async def _awaited(value: Any) -> Any:
    return await value


def _grade(value: Any, record: Mapping[str, Any]) -> Grade:
    """The result of a user's grader as a `Grade`; a right answer votes for the reference answer."""
    answer = confidence = None
    if isinstance(value, Mapping):
        if unknown := sorted(value.keys() - {"right", "score", "answer", "confidence"}):
            raise ValueError(f"the grade has an entry {unknown[0]!r}; known are right, score, answer and confidence")
        answer, confidence = value.get("answer"), value.get("confidence")
        value = value.get("right", value.get("score")) if value.get("score") is None else value["score"]
    elif isinstance(value, tuple):
        value, answer = value
    elif isinstance(value, list) and len(value) == 1:  # from a function that is called with lists
        value = value[0]
    if not isinstance(value, (bool, int, float)) and not (hasattr(value, "item") and getattr(value, "ndim", 0) == 0):
        raise TypeError(f"the grade is {value!r}; return whether the completion is right, or a number")
    number = float(value)  # pyright: ignore[reportArgumentType]  # also numbers of numpy or jax
    if number != number:
        raise ValueError("the grade is NaN; return a number, or whether the completion is right")
    if confidence is not None and not 0 <= confidence <= 1:
        raise ValueError(f"confidence is {confidence}; it must lie in [0, 1], or be None")
    right = number >= 1.0
    voted = record["answer"] or "right" if right else None if answer is None else str(answer)
    return Grade(right, voted, None if number in (0.0, 1.0) else number, confidence)


def file_grader(verifier: Verifier, records: Iterable[Mapping[str, Any]]) -> Grader:
    """The grader of a user's data set.

    Args:
      verifier: "number" or "text".
      records: its records; for "number" every reference answer must be one.

    Raises:
      ValueError: naming the first record whose answer is not a number.
    """
    if verifier == "text":
        return text_grader()
    for record in records:
        if parsed_number(record["answer"]) is None:
            raise ValueError(
                f"data.verifier is 'number', but the answer of {named_item(record)} is "
                f"{record['answer'][:80]!r}, which is not a number; set data.verifier to 'text', or "
                "data.fields.answer_from to the mark of the number"
            )
    return number_grader()
