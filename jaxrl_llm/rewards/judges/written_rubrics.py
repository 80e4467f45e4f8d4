"""Rubrics that a judge derives from the contrast of a better and a worse answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.ranges import Share, ranged
from jaxrl_llm.rewards.judges.asked import Judge, parsed_object
from jaxrl_llm.rewards.judges.ratings import asked_judge, consistent_criteria, require_fields

CONTRAST = (
    "The first answer to the problem below is better than the second. Write the criteria that a good answer to this "
    "problem has to meet, so that they tell the two apart, without naming either.\n\n"
    "Problem:\n{prompt}\n\nBetter answer:\n{chosen}\n\nWorse answer:\n{rejected}\n\n"
    'Reply with a JSON object and nothing else: {{"rules": [<what the problem demands and can be checked>, ...], '
    '"principles": [<what else makes an answer good>, ...]}}'
)
VERDICT = (
    "Decide which of two answers to the problem below meets the criteria better.\n\n"
    "Problem:\n{prompt}\n\nCriteria:\n{criteria}\n\nFirst answer:\n{first}\n\nSecond answer:\n{second}\n\n"
    'Reply with a JSON object and nothing else: {{"better": "first"}} or {{"better": "second"}}'
)


@ranged
def contrastive_rubrics(
    pairs: Sequence[Mapping[str, str]],
    *,
    judge: Mapping[str, Any] | Judge,
    template: str = CONTRAST,
    verdict_template: str = VERDICT,
    least_rate: Share = 1.0,
    rule_points: float = 2.0,
    principle_points: float = 1.0,
) -> list[list[dict[str, Any]] | None]:
    """A rubric for each pair of answers, written by a judge and kept where it reproduces the preference.

    The judge sees problem, better and worse answer and writes criteria: rules to be checked, and principles. Then it
    decides under the criteria alone which answer is better, in both orders; the rubric is dropped where the share of
    verdicts for the better one is below `least_rate`, or no answer can be parsed. The result is a column `rubric` for
    `judge_rubric`.

    Args:
      pairs: {prompt, chosen, rejected} texts.
      judge: a judge behind an endpoint, as in `judge_rating`.
      template: first question, with {prompt}, {chosen}, {rejected}.
      verdict_template: second question, with {prompt}, {criteria}, {first}, {second}.
      least_rate: smallest share of verdicts for which a rubric is kept.
      rule_points, principle_points: of a criterion.

    Returns:
      A list of {criterion, points} per pair; None where it was dropped.

    Raises:
      ValueError: for a template with other fields, or a pair without one of the three texts.

    Reference: OpenRubrics (2510.07743).
    Certainty: recalled
    """
    require_fields(template, prompt="", chosen="", rejected="")
    require_fields(verdict_template, prompt="", criteria="", first="", second="")
    for number, pair in enumerate(pairs):
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(pair.get(name), str):
                raise ValueError(f"pair {number} has no text {name!r}; it must be {{prompt, chosen, rejected}}")
    asked = asked_judge(judge, 1)
    texts = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    written = [said for (said,) in asked.ask_all([template.format(**one) for one in texts], _criteria)]
    questions = []
    for one, rubric in zip(texts, written, strict=True):
        criteria = "\n".join(f"- {text}" for text, _ in rubric or ())
        for first, second in (("chosen", "rejected"), ("rejected", "chosen")) if rubric else ():
            shown = {"first": one[first], "second": one[second], "criteria": criteria, "prompt": one["prompt"]}
            questions.append(verdict_template.format(**shown))
    answers = iter([said for (said,) in asked.ask_all(questions, _better)])
    points = (rule_points, principle_points)
    found: list[list[dict[str, Any]] | None] = []
    for rubric in written:
        if rubric is None:
            found.append(None)
            continue
        verdicts = [int(next(answers) == right) for right in ("first", "second")]
        _, (kept,) = consistent_criteria([verdicts], [1], least_rate=least_rate)
        rows = [{"criterion": text, "points": points[kind]} for text, kind in rubric]
        found.append(rows if kept else None)
    return found


def _criteria(text: str) -> list[tuple[str, int]] | None:
    """(criterion, 0 for a rule and 1 for a principle) parsed from a judge's answer; None without any."""
    said = parsed_object(text) or {}
    lists = [said.get("rules"), said.get("principles")]
    found = [
        (one.strip(), kind)
        for kind, listed in enumerate(lists)
        for one in (listed if isinstance(listed, list) else ())
        if isinstance(one, str) and one.strip()
    ]
    return found or None


def _better(text: str) -> str | None:
    said = (parsed_object(text) or {}).get("better")
    return said if said in ("first", "second") else None
