"""Verifiers on the host: from decoded text to rewards.

A host reward takes text arguments among `completions` (decoded, control tokens included, without end of sequence and
padding), `prompts` (bodies), `answers` (reference answers) and `items` (records of the data set), and returns one float
per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from jaxrl_llm.data.tasks import countdown as countdown_task
from jaxrl_llm.ranges import ranged
from jaxrl_llm.rewards.verifiers.text_similarity import Tags, said


def extract_answer(text: str, *, open_tag: str = "<a>", close_tag: str = "</a>") -> str | None:
    """Text between the last opening tag and the next closing tag, stripped; None without a closed pair.

    >>> extract_answer("<t>3+4</t><a> 7 </a>")
    '7'
    """
    opening = text.rfind(open_tag)
    if opening < 0:
        return None
    start = opening + len(open_tag)
    closing = text.find(close_tag, start)
    return None if closing < 0 else text[start:closing].strip(" \n")


def exact_match(completions: Sequence[str], answers: Sequence[str], *, tags: Tags = ("<a>", "</a>")) -> list[float]:
    """1 where the completion's answer equals the reference answer character by character, else 0.

    Spaces and line breaks around the answer do not count.

    Args:
      completions: decoded completions.
      answers: reference answers.
      tags: tags around the answer; "marked" takes the text after `####` or in a box; None the whole completion.

    Returns:
      One reward per row, 0 or 1.
    """
    compared = [said(text, tags) for text in completions]
    return [
        float(one is not None and one.strip(" \n") == answer) for one, answer in zip(compared, answers, strict=True)
    ]


def countdown(completions: Sequence[str | None], prompts: Sequence[str]) -> list[float | None]:
    """Countdown: 1 for an expression that reaches the target with each number once, 0.1 for a failing answer, else 0.

    The answer is parsed by a small grammar and evaluated exactly; it is never run as code.

    Args:
      completions: decoded completions, or a network's text for a view of them (`reads: {completions: VIEW_text}`).
      prompts: bodies such as "C:3 6 12>30".

    Returns:
      One reward per row: 1, 0.1 or 0; None for missing texts.

    Raises:
      ValueError: for a prompt that is not a Countdown problem.
    """
    return [
        None if text is None else countdown_task.reward(body, extract_answer(text))
        for text, body in zip(completions, prompts, strict=True)
    ]


def answer_position_share(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Share of right list positions, for answers that are lists separated by spaces.

        r = #{k : predicted_k == reference_k} / max(#predicted, #reference)

    Args:
      completions: decoded completions.
      answers: reference answers.

    Returns:
      One reward per row in [0, 1]; 0 without an answer. Surplus and missing elements both lower it.
    """
    predictions = [extract_answer(text) for text in completions]
    return [
        0.0 if prediction is None else _share(prediction.split(), answer.split())
        for prediction, answer in zip(predictions, answers, strict=True)
    ]


def answer_order_share(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Share of pairs in the reference's order, for answers that are lists separated by spaces.

        r = #{i < j : rank(predicted_i) < rank(predicted_j)} / (n (n - 1) / 2)

    with the rank of an element its position in the reference, equal elements taken from left to right.

    Args:
      completions: decoded completions.
      answers: reference answers.

    Returns:
      One reward per row in [0, 1]; 0 where the answer is not a permutation of the reference.
    """
    predictions = [extract_answer(text) for text in completions]
    return [
        _order_share((prediction or "").split(), answer.split())
        for prediction, answer in zip(predictions, answers, strict=True)
    ]


def column_share(completions: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[float]:
    """Share of right scratchpad steps, for steps separated by `;` (columns of an addition).

        r = #{k : written_k == reference_k} / max(#written, #reference)

    Args:
      completions: decoded completions; the steps are in the first think pair.
      items: records with the reference scratchpad in `think`.

    Returns:
      One reward per row in [0, 1]; 0 without a closed think pair, 1 where both scratchpads are empty.
    """
    rewards = []
    for text, item in zip(completions, items, strict=True):
        _, opened, rest = text.partition("<t>")
        scratch, closed, _ = rest.partition("</t>")
        rewards.append(_share(scratch.split(";"), item["think"].split(";")) if opened and closed else 0.0)
    return rewards


def _share(found: Sequence[str], wanted: Sequence[str]) -> float:
    pairs = list(zip_longest(found, wanted))
    return sum(left == right for left, right in pairs) / len(pairs) if pairs else 1.0


def _order_share(found: Sequence[str], wanted: Sequence[str]) -> float:
    if sorted(found) != sorted(wanted):
        return 0.0
    places: dict[str, list[int]] = {}
    for rank, element in enumerate(wanted):
        places.setdefault(element, []).append(rank)
    ranks = [places[element].pop(0) for element in found]
    pairs = [ranks[i] < ranks[j] for j in range(len(ranks)) for i in range(j)]
    return sum(pairs) / len(pairs) if pairs else 1.0


@ranged
def item_numbers(item: Mapping[str, Any], *, field: str, values: Mapping[str, tuple[float, ...]]) -> Any:
    """Numbers by the value of a record's field, such as percentiles of its data set (`percentile_bounded`).

    Args:
      item: a record of the data.
      field: field of the record, such as "task" or "level".
      values: value of the field as text -> numbers, one for each filled name.

    Returns:
      A tuple of numbers, or a single number.

    Raises:
      ValueError: for a record with another value.

    >>> item_numbers({"level": 2}, field="level", values={"2": (0.1, 0.5, 0.9)})
    (0.1, 0.5, 0.9)
    """
    if (said := str(item.get(field))) not in values:
        raise ValueError(f"values has no numbers for {field} {said!r}, only for {', '.join(values)}; add them")
    return values[said] if len(values[said]) > 1 else values[said][0]
