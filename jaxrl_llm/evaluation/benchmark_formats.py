"""Formats of public benchmarks: the lines of their files, and their default graders.

prompt     {"prompt": ..., "answer": ...}                                        number
messages   {"messages": [...], "answer": ...}                                    number
gsm8k      {"question": ..., "answer": "... #### 18"}                            number
math       {"problem": ..., "solution": "... \\boxed{..}"}                        math
aime       {"problem": ..., "answer": 204}                                       number
choice     {"question": ..., "choices": [...], "answer": 2 or "C"}               choice
code       {"prompt": ..., "test": ..., "entry_point": ...} or {"text": ..., "test_list": [...]}   code
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from jaxrl_llm.data.final_answer import marked_answer
from jaxrl_llm.data.jsonl import Fields, fields_of, read_records
from jaxrl_llm.data.tasks.items import answered, named_item
from jaxrl_llm.evaluation.grading import Grader, file_grader
from jaxrl_llm.rewards import latex_match
from jaxrl_llm.rewards.verifiers.unit_tests import code_of, recorded_tests, unit_tests
from jaxrl_llm.sandbox import require_isolation

Format = Literal["prompt", "messages", "gsm8k", "math", "aime", "choice", "code"]
_FIELDS: Mapping[str, Fields] = {
    "math": Fields(prompt="problem", answer="solution", response="solution", answer_from="boxed"),
    "aime": Fields(prompt="problem"),
}
GRADERS = {"math": "math", "choice": "choice", "code": "code"}
_NAMED = re.compile(r"(?:answer|choice|option)(?:\s+is)?\s*(?::\s*)?\(?\**([A-J])\b", re.IGNORECASE)
_ALONE = re.compile(r"(?<![\w'])\(?([A-J])(?:[).:,}\s]|$)")


def read_problems(path: str | Path, format: str = "prompt", fields: Mapping[str, Any] | None = None) -> list[dict]:
    """The problems of a whole file, as records; `raw` is the line itself.

    Args:
      path: a JSONL file, or a JSON file that is one list.
      format: format of its lines, see above.
      fields: changes to the names of fields, as section data.fields of a config.

    Raises:
      ValueError: for an unusable file or line, naming both.
    """
    if format not in (*_FIELDS, "prompt", "messages", "gsm8k", "choice", "code"):
        raise ValueError(f"format is {format!r}; known are prompt, messages, gsm8k, math, aime, choice and code")
    if format in _FIELDS:
        base = _FIELDS[format]
        mapped = Fields(**{**vars(base), **(fields or {})})
    else:
        mapped = fields_of(format if format in ("messages", "gsm8k") else "prompt", **(fields or {}))
    prepare = {"choice": _choice, "code": _code}.get(format, dict)
    return read_records(Path(path), mapped, prepare=prepare)[0]


def benchmark_grader(name: str, records: list[dict]) -> Grader:
    """The shipped grader of a name: number, text, math, choice, code or code_unisolated.

    Raises:
      ValueError: for an unknown name, or records that it cannot grade.
    """
    if name in ("number", "text"):
        return file_grader(name, records)
    if name == "choice":
        return choice_grader()
    if name == "math":
        return math_grader()
    if name in ("code", "code_unisolated"):
        if lacking := [each for each in records if not recorded_tests(each)]:
            raise ValueError(
                f"{named_item(lacking[0])} has no unit tests; grader {name} reads `test`, `test_list`, "
                "`test_cases` or `input_output`"
            )
        if name == "code":
            require_isolation(remedy="Grader code_unisolated runs it with limits only")
        return code_grader(allow_unisolated=name == "code_unisolated")
    raise ValueError(
        f"grader is {name!r}; known are number, text, math, choice, code and code_unisolated, or module:function for "
        "one of your own"
    )


def choice_grader() -> Grader:
    """A grader for the letter that a completion chooses.

    The letter is taken from the marked answer (after `####`, in a box, or in answer tags), from after "answer is", or
    is the last single letter.

    >>> grade = choice_grader()
    >>> grade({"answer": "C"}, "A is wrong, so the answer is (C)."), grade({"answer": "C"}, "no idea")
    ((True, 'C'), (False, None))
    """

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        marked = marked_answer(completion) or answered(completion)
        text = completion if marked is None else marked
        found = _NAMED.findall(text) or _ALONE.findall(text)
        said = found[-1].upper() if found else None
        return said == record["answer"].strip().upper(), said

    return grade


def math_grader() -> Grader:
    r"""A grader for mathematics in LaTeX with `latex_match`, which needs the extra `math`.

    >>> math_grader()({"answer": r"\frac{1}{2}"}, r"so it is \boxed{0.5}")
    (True, '\\frac{1}{2}')
    """

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        right = latex_match([completion], [record["answer"]])[0] >= 1.0
        return right, record["answer"] if right else marked_answer(completion)

    return grade


def code_grader(*, seconds: float = 10.0, allow_unisolated: bool = False) -> Grader:
    """A grader for code: all unit tests of the record must pass in the sandbox (see `unit_tests`).

    A completion that does not define `entry_point` is appended to the prompt, as for a base model.
    """

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        line, code = record.get("raw", {}), code_of(completion)
        entry = line.get("entry_point")
        if entry and f"def {entry}" not in code:
            code = str(line.get("prompt", record["body"])) + completion
        calling = {"mode": "all", "seconds": seconds, "allow_unisolated": allow_unisolated}
        right = unit_tests([f"```python\n{code}\n```"], [record], **calling) == [1.0]
        return right, "passes" if right else "fails"

    return grade


def _choice(line: Mapping[str, Any]) -> dict[str, Any]:
    """A question with lettered choices as a prompt, and the letter of the right one as its answer."""
    choices = line.get("choices", line.get("options"))
    if isinstance(choices, Mapping):  # {"text": [...], "label": [...]}
        choices = choices.get("text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 10:
        raise ValueError(f"choices is {str(choices)[:60]}; give a list of 2 to 10")
    given = line.get("answer", line.get("answerKey", line.get("label")))
    letters = ascii_uppercase[: len(choices)]
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(choices):
        letter = letters[given]
    elif isinstance(given, str) and len(given.strip()) == 1 and given.strip().upper() in letters:
        letter = given.strip().upper()
    else:
        raise ValueError(
            f"answer is {given!r}; give the letter, or the number from 0, of one of {len(choices)} choices"
        )
    lines = [f"{name}. {text}" for name, text in zip(letters, choices, strict=True)]
    question = line.get("question", line.get("prompt"))
    if not isinstance(question, str):
        raise ValueError(f"question is {question!r}; it must be a text")
    prompt = "\n".join([question, *lines, "Answer with the letter of the right choice."])
    return {**line, "prompt": prompt, "answer": letter}


def _code(line: Mapping[str, Any]) -> dict[str, Any]:
    """A programming problem with its tests; the answer is that they pass."""
    if not isinstance(line.get("test"), str) and not isinstance(line.get("test_list"), list):
        raise ValueError("there are no unit tests; give `test` (with `entry_point`) or `test_list`")
    prompt = line.get("prompt", line.get("text"))
    if "test_list" in line and "text" in line:
        prompt = "\n".join([line["text"], "Your code should pass these tests:", *line["test_list"]])
    return {**line, "prompt": prompt, "answer": "passes"}
