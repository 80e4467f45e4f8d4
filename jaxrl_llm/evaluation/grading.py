"""Graders: is a completion right, and which answer does it vote for. They read text, on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jaxrl_llm.data import Item, Task
from jaxrl_llm.data.final_answer import marked_answer
from jaxrl_llm.rewards import extract_number, parsed_number

# (record, completion) -> (whether it is right, the answer that it votes for; None where it gives none). Every right
# answer votes for the reference answer, so that many spellings of it do not split the vote.
Grader = Callable[[Mapping[str, Any], str], tuple[bool, str | None]]
Verifier = Literal["number", "text"]


def task_grader(task: Task) -> Grader:
    """Grades by the task's own verifier the answer that a completion gives, or the moves of a conversation."""

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        item = Item(**{name: record[name] for name in Item.__dataclass_fields__})
        said = task.said(completion)
        right = task.verify(item, said) >= 1.0
        return right, item.answer if right else said

    return grade


def number_grader() -> Grader:
    """Grades the completion's final number against the reference answer, as rational numbers (see `number_match`).

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
    """Grades what is marked (boxed, or behind `####`), else the whole completion, against the reference answer as text.

    >>> text_grader()({"answer": "B"}, "It must be #### B"), text_grader()({"answer": "B"}, " A ")
    ((True, 'B'), (False, 'A'))
    """

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        marked = marked_answer(completion)
        said = (completion if marked is None else marked).strip()
        return said == record["answer"].strip(), said or None

    return grade


def file_grader(verifier: Verifier, records: Iterable[Mapping[str, Any]]) -> Grader:
    """The grader of a user's data set.

    Args:
      verifier: "number" or "text".
      records: its records; for "number" every reference answer must be one.

    Raises:
      ValueError: naming the first record whose answer is no number.
    """
    if verifier == "text":
        return text_grader()
    for record in records:
        if parsed_number(record["answer"]) is None:
            raise ValueError(
                f"data.verifier is 'number', but the answer of item {record['item_id']} is "
                f"{record['answer'][:80]!r}, which is no number; set data.verifier to 'text', or data.fields."
                "answer_from to where the number stands"
            )
    return number_grader()
