"""Unit tests of code in completions: the forms that records have, and what cannot be deceived."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from jaxrl_llm.rewards import graded_programs, milestone_reward, unit_tests
from jaxrl_llm.rewards.verifiers.unit_tests import UnitTest, code_of, passed_share, recorded_tests, same_lines
from jaxrl_llm.run.recipes import reward_terms
from jaxrl_llm.sandbox import programs

DOUBLES = "print(2 * int(input()))"
CASES = [{"input": "2", "output": "4"}, {"input": "3\n", "output": "6\n"}, {"input": "0", "output": "1"}]


def block(code):
    return f"So:\n```python\n{code}\n```\nDone."


@pytest.mark.parametrize(
    ("pair", "same"),
    [(("1 \n2\n", "1\n2"), True), (("1", "1\n2"), False), (("1\n2\n3", "1\n2"), False), (("", "1"), False)],
)
def test_lines_are_equal_in_number_too(pair, same):
    assert same_lines(*pair) == same


def test_what_statuses_are_worth():
    assert passed_share(["pass", "pass", "fail", "pass"], mode="fraction") == 0.75
    assert passed_share(["timeout", "pass"], mode="prefix") == 0
    assert passed_share(["pass", "pass"], mode="prefix") == passed_share(["pass"], mode="all") == 1


FORMS = {
    "cases": ({"test_cases": CASES}, 3, UnitTest(None, "2", "4")),
    "JSON text of open-r1": ({"verification_info": json.dumps({"test_cases": CASES})}, 3, UnitTest(None, "2", "4")),
    "APPS": ({"input_output": json.dumps({"inputs": ["2"], "outputs": ["4"]})}, 1, UnitTest(None, "2", "4")),
    "a call": (
        {"input_output": {"fn_name": "f", "inputs": [[2]], "outputs": [4]}},
        1,
        UnitTest(None, [2], 4, "f"),
    ),
    "a call in text": (
        {"test_cases": [{"fn_name": "f", "input": '[1, 2]\n"a"', "output": "true"}]},
        1,
        UnitTest(None, [[1, 2], "a"], True, "f"),
    ),
    "MBPP": ({"raw": {"test_list": ["assert f(2) == 4", "assert f(0) == 0"]}}, 2, UnitTest("\nassert f(2) == 4")),
    "HumanEval": ({"test": "def check(f): ...", "entry_point": "f"}, 1, UnitTest("def check(f): ...\n\ncheck(f)")),
    "none": ({"answer": "4"}, 0, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_records_hold_tests_in_many_forms(form):
    item, count, first = FORMS[form]
    found = recorded_tests(item)
    assert len(found) == count
    assert found[:1] == ([] if first is None else [first])


def test_rewards_of_rows_in_one_go():
    """One call, as processes run side by side: what each row is, and what it is worth."""
    asserts = {"test_list": ["assert f(2) == 4", "assert f(3) == 6"]}
    call = {"input_output": {"fn_name": "f", "inputs": [[[2, 1]]], "outputs": [[1, 2]]}}
    double = "def f(x): return 2 * x"
    rows = [
        (block(DOUBLES), {"test_cases": CASES}, 2 / 3),
        (block("print(4)"), {"test_cases": CASES[:2]}, 0.5),
        (block("pass"), {"test_cases": CASES[:2]}, 0.0),
        (DOUBLES, {"test_cases": CASES}, -0.5),  # no block
        (block("print("), {"test_cases": CASES}, -1.0),  # no Python
        (block(DOUBLES), {}, None),
        (block(double), asserts, 1.0),
        (block("def f(x): return 4"), asserts, 0.0),  # all of the tests
        (block("import sys; sys.exit(0)"), asserts, 0.0),
        (block("import os; os._exit(0)"), asserts, 0.0),
        (block("class Solution:\n    def f(self, x): return tuple(sorted(x))"), call, 1.0),
        (block('import os\nos.write(3, b\'{"value": [[1, 2]], "done": true}\')\ndef f(x): return 0'), call, 0.0),
    ]
    completions, items, expected = zip(*rows, strict=True)
    found = unit_tests(completions, items, no_code=-0.5, does_not_compile=-1.0, allow_unisolated=True)
    assert found == pytest.approx(expected, nan_ok=True)
    assert unit_tests([block("def f(x): return 4")], [asserts], mode="prefix", allow_unisolated=True) == [0.5]


def test_a_program_is_graded_timed_and_its_milestones_counted():
    slow = "import time, sys\ntime.sleep(0.3)\nprint('model defined', file=sys.stderr)\n" + DOUBLES
    programs = [block(slow), block("print('loaded')\nraise ValueError"), block("print("), DOUBLES]
    grade = functools.partial(graded_programs, milestones=("loaded", "model .*ed"), allow_unisolated=True)
    found = grade(programs, [{"test_cases": CASES[:2]}] * 4)
    np.testing.assert_array_equal(found["quality"], [1.0, np.nan, np.nan, np.nan])
    assert found["milestones"] == [1, 1, 0, 0]
    assert found["trained"] == [1, 0, 0, 0]
    slowest, failed, *others = found["durations"]
    assert others[1] == 0 < failed < slowest < 10
    assert slowest > 0.6
    graded = [np.array(found[name], np.float32) for name in ("quality", "milestones", "trained")]
    np.testing.assert_allclose(milestone_reward(*graded), [1.1, -10, -10, -10])
    with pytest.raises(ValueError, match="the record of row 0 has no tests; it has body"):
        grade([block(DOUBLES)], [{"body": "x"}])
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression .* escape literal characters"):
        graded_programs([], [], trained="(")


def test_a_sandbox_that_fails_judges_nobody(monkeypatch):
    monkeypatch.setattr(programs, "_outcome", lambda told, program: None)
    assert np.isnan(graded_programs([block(DOUBLES)], [{"test_cases": CASES}], allow_unisolated=True)["quality"]).all()
    assert unit_tests([block(DOUBLES)], [{"test_cases": CASES[:1]}], allow_unisolated=True) == [None]


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="mode is 'some'; it must be fraction, all or prefix"):
        unit_tests([], [], mode="some")
    with pytest.raises(ValueError, match="a test case is 7; it must have `input` and `output`"):
        unit_tests(["x"], [{"test_cases": [7]}])
    with pytest.raises(ValueError, match="are 'x', which is not JSON"):
        unit_tests(["x"], [{"test_cases": "x"}])
    monkeypatch.setattr(programs, "facilities", lambda: frozenset({"landlock"}))
    with pytest.raises(ValueError, match=r"no protection of the network, other processes\. .* allow_unisolated"):
        unit_tests([block(DOUBLES)], [{"test_cases": CASES}])


def test_recipes_can_name_it():
    (term,) = reward_terms([{"unit_tests": {"mode": "all", "seconds": 2}}])
    assert term.on_host


def test_the_last_block_is_the_code():
    assert code_of("```\na\n```\nbetter:\n```python\nb\n```") == "b\n"
    assert code_of("```python\ncut off") == "cut off"
