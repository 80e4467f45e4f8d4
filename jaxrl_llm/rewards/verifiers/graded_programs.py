"""Grades of programs: the share of passed tests, their duration, and milestones found in the output."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.ranges import Count, Positive, ranged
from jaxrl_llm.rewards.verifiers.unit_tests import Tested, passed_share, tested_programs
from jaxrl_llm.sandbox import Limits


@ranged
def graded_programs(
    completions: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    milestones: tuple[str, ...] = (),
    trained: str | None = None,
    most_tests: Count | None = None,
    seconds: Positive = 5.0,
    memory_gib: Positive = 1.0,
    allow_unisolated: bool = False,
) -> dict[str, list[float]]:
    """Passed share, partial credit and duration of each program, for `milestone_reward` and `duration_weights`.

    An entry of credit fills all four names: `"[quality, milestones, trained, durations]": graded_programs`. Patterns
    are searched in the output of all tests of a program. Messages that the policy can print itself are no evidence; let
    the tests print them, or a frozen model that inserts them into the program.

    Args:
      completions: decoded completions; the program is the last fenced block.
      items: records with tests, in a form of `unit_tests`.
      milestones: regular expressions; each is counted once.
      trained: regular expression that indicates a completed program; None requires that one of its tests ended by
        itself.
      most_tests: number of tests to run, from the first; None runs all.
      seconds, memory_gib: limits of each test.
      allow_unisolated: run tests even if the system cannot isolate them.

    Returns:
      quality: share of passed tests; NaN if no test ended by itself, or the sandbox failed. milestones: number of
      patterns found. trained: 1 if the program completed, else 0. durations: sum of seconds over the tests of a row.

    Raises:
      SandboxError: if the system cannot isolate code, unless that is allowed. ValueError: for a record without tests,
      tests in another form, or an invalid regular expression.

    Reference: RL for machine-learning engineering agents (2509.01684).
    Certainty: reconstructed
    """
    patterns = {text: _pattern(text) for text in (*milestones, *([] if trained is None else [trained]))}
    limits = Limits(seconds, int(memory_gib * 2**30))
    tested = tested_programs(completions, items, most_tests=most_tests, limits=limits, unisolated=allow_unisolated)
    found: dict[str, list[float]] = {"quality": [], "milestones": [], "trained": [], "durations": []}
    if (bare := next((number for number, row in enumerate(tested) if not row.tests), None)) is not None:
        raise ValueError(f"graded_programs: the record of row {bare} has no tests; it has {', '.join(items[bare])}")
    for row in tested:
        for name, value in _grades(row, patterns, milestones, trained).items():
            found[name].append(value)
    return found


def _grades(
    row: Tested, patterns: Mapping[str, re.Pattern[str]], milestones: tuple[str, ...], trained: str | None
) -> dict[str, float]:
    outcomes = [outcome for outcome in row.outcomes if outcome is not None]
    ended = [outcome for outcome in outcomes if outcome.verdict in ("pass", "fail")]
    wrote = "\n".join(f"{outcome.stdout}\n{outcome.stderr}" for outcome in outcomes)
    judged = bool(ended) and len(outcomes) == len(row.outcomes)
    did = judged if trained is None else patterns[trained].search(wrote) is not None
    return {
        "quality": passed_share([outcome.verdict for outcome in outcomes], mode="fraction") if judged else math.nan,
        "milestones": float(sum(patterns[text].search(wrote) is not None for text in milestones)),
        "trained": float(did),
        "durations": sum(outcome.seconds for outcome in outcomes),
    }


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression ({error}); escape literal characters") from None
