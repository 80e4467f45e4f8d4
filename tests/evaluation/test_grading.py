"""Graders: those of the user's own in every form, benchmark formats, and code run with its tests."""

from __future__ import annotations

import json

import pytest

from jaxrl_llm.evaluation import Grade, GraderError, benchmark_grader, function_grader, read_problems
from jaxrl_llm.evaluation.benchmark_formats import choice_grader
from jaxrl_llm.evaluation.grading import require_columns

RECORD = {"item_id": 3, "body": "2+2?", "answer": "4", "raw": {"source": "school"}}


async def slow(completion, answer):
    return completion == answer


@pytest.mark.parametrize(
    ("function", "completion", "expected"),
    [
        (lambda completion, answer: completion == answer, "4", Grade(True, "4")),
        (lambda completion, answer: completion == answer, "5", Grade(False)),
        (lambda completion, source: 0.5 if source == "school" else 1, "x", Grade(False, None, 0.5)),
        (lambda completion, tolerance=2: tolerance, "x", Grade(True, "4", 2.0)),
        (lambda item, completion: (item["body"] == "2+2?", "no matter"), "x", Grade(True, "4")),
        (lambda completion, answer: (False, completion), "5", Grade(False, "5")),
        (lambda completion: {"right": False, "answer": 5, "confidence": 0.3}, "5", Grade(False, "5", None, 0.3)),
        (lambda completion: {"score": 0.25}, "5", Grade(False, None, 0.25)),
        (
            lambda completions, answers: [c == a for c, a in zip(completions, answers, strict=True)],
            "4",
            Grade(True, "4"),
        ),
        (lambda **data: data["prompt"] == "2+2?" and data["source"] == "school", "x", Grade(True, "4")),
        (slow, "4", Grade(True, "4")),
    ],
)
def test_a_grader_of_ones_own_may_return_what_is_natural(function, completion, expected):
    assert function_grader(function)(RECORD, completion) == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completion: 1 / 0, "'mine' failed at item 3 .* ZeroDivisionError.* the completion was 'oops'"),
        (lambda completion: None, "the grade is None; return whether"),
        (lambda completion: float("nan"), "the grade is NaN"),
        (lambda completion: {"correct": 1}, "has an entry 'correct'"),
        (lambda completion: {"score": 1, "confidence": 7}, "confidence is 7"),
        (lambda completion: "yes", "the grade is 'yes'"),
    ],
)
def test_what_goes_wrong_in_a_grader_names_problem_and_completion(function, message):
    with pytest.raises(GraderError, match=message):
        function_grader(function, name="mine")(RECORD, "oops")


def test_a_column_that_is_not_there_is_refused_beforehand():
    with pytest.raises(ValueError, match=r"grader 'mine' names 'sauce', but item 3 has only the columns source; name"):
        require_columns(lambda completion, sauce: True, [RECORD], "mine")
    require_columns(lambda completion, source, other=1, **rest: True, [RECORD], "mine")


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("The answer is (C).", "C"),
        ("**Answer:** B", "B"),
        ("A is wrong and so is B. #### D", "D"),
        (r"\boxed{\text{A}}", "A"),
        ("<t>B or C</t><a>C</a>", "C"),
        ("C", "C"),
        ("B) because", "B"),
        ("I choose option b", "B"),
        ("An apple", None),
        ("", None),
    ],
)
def test_the_letter_that_is_chosen(completion, said):
    assert choice_grader()({"answer": "C"}, completion) == (said == "C", said)


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        (r"\frac{1}{2}", r"so \boxed{\dfrac12}", True),
        (r"\frac{\sqrt 2}{2}", r"\boxed{1/\sqrt{2}}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{1/2}", True),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", False),
        ("10000", r"\boxed{10{,}000}", True),
        ("10000", r"\boxed{10,000}", True),
        ("90", r"\boxed{90^\circ}", True),
        ("90", r"\boxed{x = 90}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}", True),
        (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
        (r"2\sqrt{3}", r"\boxed{2\sqrt3}", True),
        ("3", r"\boxed{13}", False),
        ("x \\le 3", r"\boxed{x = 3}", False),
        ("7", "7 or 8", False),
        ("7", r"\boxed{}", False),
    ],
)
def test_answers_in_latex_are_equal_in_any_spelling(answer, completion, right):
    grade = benchmark_grader("math", [])
    assert grade({"answer": answer}, completion) == (
        right,
        answer if right else grade({"answer": answer}, completion)[1],
    )


def written(tmp_path, *lines):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("format", "line", "body", "answer", "right", "wrong"),
    [
        ("gsm8k", {"question": "q", "answer": "so #### 18"}, "q", "18", "it is 18", "19"),
        ("aime", {"problem": "p", "answer": 204}, "p", "204", "#### 204", "20"),
        ("choice", {"question": "q", "choices": ["x", "y"], "answer": 1}, None, "B", "B", "A"),
        ("choice", {"question": "q", "choices": {"text": ["x", "y"]}, "answerKey": "b"}, None, "B", "(B)", "A"),
        ("code", {"prompt": "p", "test": "assert f(2) == 4"}, "p", "passes", "def f(x): return x * 2", "def f(x): 0"),
        (
            "code",
            {"prompt": "def f(x):\n", "test": "def check(g): assert g(2) == 4", "entry_point": "f"},
            "def f(x):\n",
            "passes",
            "    return 2 * x",
            "    return 3",
        ),
        (
            "code",
            {"text": "Double.", "test_list": ["assert f(2) == 4"]},
            "Double.\nYour code should pass these tests:\nassert f(2) == 4",
            "passes",
            "```python\ndef f(x): return 2 * x\n```",
            "f = 3",
        ),
    ],
)
def test_formats_are_read_and_graded(tmp_path, format, line, body, answer, right, wrong):
    (record,) = read_problems(written(tmp_path, line), format)
    assert (record["body"] == body or body is None, record["answer"], record["raw"]) == (True, answer, line)
    grade = benchmark_grader({"gsm8k": "number", "aime": "number"}.get(format, format), [record])
    assert grade(record, right)[0]
    assert not grade(record, wrong)[0]


def test_lines_that_cannot_be_used_are_named(tmp_path):
    file = written(tmp_path, {"question": "q", "choices": ["x"], "answer": 0}, {"question": "q"})
    with pytest.raises(ValueError, match=r"2 lines that cannot be used; .* line 1: choices is \['x'\]"):
        read_problems(file, "choice")
    with pytest.raises(ValueError, match="line 1: there are no unit tests"):
        read_problems(file, "code")
    with pytest.raises(ValueError, match="known are number, text, math, choice, code and code_uniso"):
        benchmark_grader("numbr", [])
