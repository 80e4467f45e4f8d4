"""What the tests of a program say, how long they took, and how far its output shows that it came."""

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
    """The score of a program, its partial credit and its seconds, for `milestone_reward` and `duration_weights`.

    An entry of credit fills all four names at once: `"[quality, milestones, trained, durations]": graded_programs`.
    The patterns are looked for in what all tests of a program wrote. Messages that the policy can print itself are no
    evidence; tests that print them, or a model that does not learn and writes them into the program, are.

    Args:
      completions: decoded completions; the program is the last fenced block.
      items: records with tests, in a form of `unit_tests`.
      milestones: regular expressions; each counts once.
      trained: regular expression of what shows that a program did its work; None asks that one of its tests ended.
      most_tests: the first so many are run; None runs all.
      seconds, memory_gib: that a test may take.
      allow_unisolated: run them where the system cannot isolate them.

    Returns:
      quality: share of the tests that are passed; NaN where no test ended by itself, or the sandbox itself has failed.
      milestones: patterns that were found.
      trained: 1 or 0.
      durations: seconds of all tests of a row.

    Raises:
      SandboxError: where the system cannot isolate code, unless that is allowed.
      ValueError: for a record without tests, tests in another form, or a pattern that is none.

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
        raise ValueError(f"{text!r} is no regular expression ({error}); escape what is meant as it is") from None
