"""Tool calls in a completion against those of a reference: names, parameters, values."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxrl_llm.data.tasks.items import tagged
from jaxrl_llm.ranges import NonNegative, Positive, ranged

CallForm = Literal["graded", "coarse", "strict"]


@ranged
def tool_calls_match(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    form: CallForm = "graded",
    tags: tuple[str, str] = ("<tool_call>", "</tool_call>"),
    scale: Positive = 3.0,
    format_weight: NonNegative = 1.0,
) -> list[float]:
    """Agreement of a completion's tool calls with the reference's.

        S_max = 1 + sum_j (1 + n_j),   n_j the parameters of reference call j
        S = iou(names) + sum_j max_i (iou(parameter names) + #{equal values})
        r = format_weight * [readable] + scale * (2 * S / S_max - 1)

    with the maximum over calls i of the same name that are not matched to an earlier j. Equal calls in equal order give
    `scale`; unreadable calls, or none where some are expected, -scale. Where no call is expected, correctness is 0.

    Args:
      completions: decoded completions; calls are inside the last pair of tags, as a JSON list, one object, or one
        object per line, each with `name` and `parameters` (or `arguments`); or as Python calls, one per line.
      answers: reference calls in the same form; an empty text, or [], expects none.
      form: "coarse" gives scale where names and parameter names agree, "strict" where everything does, else -scale.
      tags: tags around the calls.
      scale: correctness is in [-scale, scale].
      format_weight: reward of readable calls where some are expected, else of a completion without calls.

    Returns:
      One reward per row.

    Raises:
      ValueError: for an unknown form, or an unreadable reference.

    >>> tool_calls_match(
    ...     ['<tool_call>{"name": "search", "parameters": {"q": "a", "k": 3}}</tool_call>'],
    ...     ['{"name": "search", "parameters": {"q": "a", "k": 5}}'],
    ...     format_weight=0,
    ... )
    [1.5]

    Reference: ToolRL (2504.13958).
    Certainty: verified
    """
    if form not in get_args(CallForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(CallForm))}")
    rewards = []
    for row, (text, answer) in enumerate(zip(completions, answers, strict=True)):
        if (wanted := _calls(answer)) is None:
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which is not a list of tool calls; write JSON "
                'such as [{"name": "search", "parameters": {"q": "cats"}}]'
            )
        inner = tagged(text, *tags)
        made = None if inner is None else _calls(inner)
        readable = bool(made) if wanted else tags[0] not in text
        share = 0.5 if not wanted else 0.0 if not made else _share(wanted, made, form)
        rewards.append(format_weight * readable + scale * (2 * share - 1))
    return rewards


def _share(wanted: list[dict[str, Any]], made: list[dict[str, Any]], form: str) -> float:
    """S / S_max, or 0 or 1 in the coarse and strict forms."""
    if form == "strict" or made == wanted:
        return float(made == wanted)
    if form == "coarse":
        return float([_outline(call) for call in made] == [_outline(call) for call in wanted])
    total = _iou([call["name"] for call in wanted], [call["name"] for call in made])
    left = list(made)
    for call in wanted:
        best, found = 0.0, None
        for other in left:
            if other["name"] == call["name"]:
                mine, theirs = call["parameters"], other["parameters"]
                equal = sum(name in theirs and theirs[name] == value for name, value in mine.items())
                if (score := _iou(list(mine), list(theirs)) + equal) > best:
                    best, found = score, other
        if found is not None:
            left = [other for other in left if other is not found]
            total += best
    return total / (1 + sum(1 + len(call["parameters"]) for call in wanted))


def _outline(call: Mapping[str, Any]) -> tuple[str, list[str]]:
    return call["name"], sorted(call["parameters"])


def _iou(one: list[str], other: list[str]) -> float:
    """Intersection over union of multisets; 1 where both are empty."""
    if one == other:
        return 1.0
    both = (Counter(one) & Counter(other)).total()
    return both / (len(one) + len(other) - both)


def _calls(text: str) -> list[dict[str, Any]] | None:
    """The calls of a text; None where they are unreadable."""
    try:
        read = _parsed(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    calls = []
    for call in read if isinstance(read, list) else [read]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        parameters = call.get("parameters", call.get("arguments", {}))
        if not isinstance(parameters, dict):
            return None
        calls.append({"name": call["name"], "parameters": parameters})
    return calls


def _parsed(text: str) -> Any:
    if not text:
        return []
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [_of_line(line.strip()) for line in text.splitlines() if line.strip()]


def _of_line(line: str) -> Any:
    """A call as JSON, or as a Python call with constant keyword arguments: search(q="cats", k=3)."""
    if line.startswith("{"):
        return json.loads(line)
    call = ast.parse(line, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(line)
    return {"name": call.func.id, "parameters": {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}}
