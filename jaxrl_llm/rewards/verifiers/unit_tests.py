"""Code in completions, verified by unit tests in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_llm.ranges import Count, Positive, ranged
from jaxrl_llm.sandbox import Limits, Outcome, Program, run_programs

Mode = Literal["fraction", "all", "prefix"]
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@ranged
def unit_tests(
    completions: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    mode: Mode | None = None,
    most_tests: Count | None = None,
    seconds: Positive = 5.0,
    memory_gib: Positive = 1.0,
    no_code: float = 0.0,
    does_not_compile: float = 0.0,
    allow_unisolated: bool = False,
) -> list[float | None]:
    """Share of unit tests that the code of a completion passes, each run in a sandbox.

        status per test in {pass, fail, error, timeout, forbidden}
        fraction: passed / number of tests
        all:      1 iff every test passes
        prefix:   tests passed before the first failure / number of tests

    A case of input and output passes iff output and expectation, outer blanks removed, have the same number of lines
    and agree line by line, each line stripped. The expected output is not visible to the program's process. Tests that
    are code run in the same process after the program, which can therefore deceive them.

    Args:
      completions: decoded completions; the code is the last fenced block.
      items: records with one of these, at the top, in `raw`, or as JSON text:
        `test` (Python; with `entry_point`, a function that its `check` is called with, as HumanEval), `test_list`
        (lines of Python, with `test_setup_code`, as MBPP), `test_cases` (a list of `{input, output}`, with `fn_name`
        for a call), `input_output` (`{inputs, outputs}`, with `fn_name` for calls).
      mode: None is "fraction" for cases of input and output, "all" for tests that are code.
      most_tests: run only the first tests; None runs all.
      seconds: time limit of a test.
      memory_gib: memory limit of a test.
      no_code: reward of a completion without a fenced block.
      does_not_compile: reward of code with a syntax error.
      allow_unisolated: run code also where the system cannot isolate it.

    Returns:
      One reward per row; None for a record without tests, or a failure of the sandbox itself.

    Raises:
      SandboxError: where the system cannot isolate code, without allow_unisolated. ValueError: for an unknown mode, or
      tests in another form.

    >>> item = {"test_cases": [{"input": "2", "output": "4"}, {"input": "3", "output": "9"}]}
    >>> unit_tests(["```python\\nprint(int(input()) * 2)\\n```"], [item], allow_unisolated=True)
    [0.5]

    Reference: code reward of open-r1 (the fraction on cases of input and output); the other modes are common practice.
    Certainty: verified
    """
    if mode not in (None, "fraction", "all", "prefix"):
        raise ValueError(f"mode is {mode!r}; it must be fraction, all or prefix")
    limits = Limits(seconds, int(memory_gib * 2**30))
    tested = tested_programs(completions, items, most_tests=most_tests, limits=limits, unisolated=allow_unisolated)

    def reward(row: Tested) -> float | None:
        if not row.tests:
            return None
        if row.code is None:
            return no_code
        judged = [outcome for outcome in row.outcomes if outcome is not None]
        if len(judged) < len(row.tests):
            return None
        if judged[0].detail.startswith("does not compile"):
            return does_not_compile
        usual: Mode = "all" if row.tests[0].code is not None else "fraction"
        return passed_share([outcome.verdict for outcome in judged], mode=mode or usual)

    return [reward(row) for row in tested]


def code_of(completion: str) -> str:
    """The code of a completion: its last fenced block, or all of it without one.

    >>> code_of("Here it is:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else completion


def passed_share(statuses: Sequence[str], *, mode: Mode) -> float:
    """Reward of the statuses of all tests of a program.

    >>> [passed_share(["pass", "pass", "fail", "pass"], mode=mode) for mode in ("fraction", "all", "prefix")]
    [0.75, 0.0, 0.5]
    """
    passed = [status == "pass" for status in statuses]
    if mode == "all":
        return float(all(passed))
    return (sum(passed) if mode == "fraction" else [*passed, False].index(False)) / len(passed)


def same_lines(output: str, expected: str) -> bool:
    """Whether two texts have the same number of lines and equal lines after stripping blanks.

    >>> same_lines("1 \\n2\\n", "1\\n2"), same_lines("1", "1\\n2")
    (True, False)
    """
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (output, expected)]
    return lines[0] == lines[1]


class UnitTest(NamedTuple):
    """One test of a program: code that runs after it, or input and expected output.

    Attributes:
      code: Python; None for a case.
      input: standard input, or arguments of the call.
      expected: standard output, or value of the call.
      function: function to call; None for standard input.
    """

    code: str | None = None
    input: Any = ""
    expected: Any = None
    function: str | None = None

    def program(self, source: str) -> Program:
        if self.function is not None:
            return Program(source, call=(self.function, self.input))
        return Program(source, self.input, self.code)

    def judged(self, outcome: Outcome) -> Outcome:
        if self.code is not None or outcome.verdict != "pass":
            return outcome
        called = self.function is not None
        right = outcome.value == self.expected if called else same_lines(outcome.stdout, self.expected)
        return outcome if right else outcome._replace(verdict="fail", detail="output differs from the expected one")


class Tested(NamedTuple):
    """The program of a row and the outcomes of its tests.

    Attributes:
      code: content of the last fenced block; None without a block.
      tests: tests of the record.
      outcomes: one outcome per test; None if the sandbox failed. Empty without code.
    """

    code: str | None
    tests: list[UnitTest]
    outcomes: list[Outcome | None]


def tested_programs(
    completions: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    most_tests: int | None,
    limits: Limits,
    unisolated: bool,
) -> list[Tested]:
    """Runs the tests of all rows in the sandbox; one result per row."""
    tests = [recorded_tests(item)[:most_tests] for item in items]
    codes = [blocks[-1] if (blocks := _BLOCK.findall(text)) else None for text in completions]
    found = [Tested(code, own, []) for code, own in zip(codes, tests, strict=True)]
    asked = [(row, test) for row in found if row.code is not None for test in row.tests]
    programs = [test.program(str(row.code)) for row, test in asked]
    outcomes = run_programs(programs, limits=limits, allow_unisolated=unisolated)
    for (row, test), outcome in zip(asked, outcomes, strict=True):
        row.outcomes.append(None if outcome is None else test.judged(outcome))
    return found


def recorded_tests(item: Mapping[str, Any]) -> list[UnitTest]:
    """The tests of a record, in any of the forms of `unit_tests`; an empty list without tests.

    Raises:
      ValueError: for tests in another form.
    """
    line = {**item, **(item.get("raw") or {})}
    line |= _parsed(line.get("verification_info")) or {}
    if line.get("test_list"):
        setup = line.get("test_setup_code") or ""
        return [UnitTest(f"{setup}\n{test}") for test in _parsed(line["test_list"])]
    if line.get("test"):
        entry = line.get("entry_point")
        return [UnitTest(f"{line['test']}\n\ncheck({entry})" if entry else line["test"])]
    cases = _parsed(line.get("test_cases")) or []
    if pairs := _parsed(line.get("input_output")):
        both = zip(pairs.get("inputs", ()), pairs.get("outputs", ()), strict=True)
        cases = [{"input": given, "output": wanted, "fn_name": pairs.get("fn_name")} for given, wanted in both]
    return [_case(case) for case in cases]


def _case(case: Any) -> UnitTest:
    if not isinstance(case, Mapping) or not {"input", "output"} <= case.keys():
        raise ValueError(f"a test case is {str(case)[:80]}; it must have `input` and `output`")
    given, wanted, function = case["input"], case["output"], case.get("fn_name")
    if function is not None:  # text has one JSON argument per line
        given = [json.loads(line) for line in given.splitlines() if line] if isinstance(given, str) else list(given)
        return UnitTest(None, given, json.loads(wanted) if isinstance(wanted, str) else wanted, function)
    texts = ("\n".join(map(str, each)) if isinstance(each, list) else str(each) for each in (given, wanted))
    return UnitTest(None, *texts)


def _parsed(value: Any) -> Any:
    """Tests parsed from JSON text, or unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError(
            f"the tests of a record are {value[:80]!r}, which is not JSON; store them as JSON text or a list"
        ) from None
