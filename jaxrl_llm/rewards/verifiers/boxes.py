"""Answers that are lists of numbers: boxes in an image, spans of time or text, vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxrl_llm.ranges import NonNegative, Positive, ranged
from jaxrl_llm.rewards.verifiers.text_similarity import Tags, said

# Bounded length: longer numbers are no coordinates, and the text is arbitrary.
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,12}(?:\.\d{1,12})?(?![\w.]*\d)")


@ranged
def box_match(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    width: Positive,
    height: Positive,
    tags: Tags = None,
    hit_weight: NonNegative = 1.0,
    overlap_weight: NonNegative = 0.25,
    closeness_weight: NonNegative = 0.125,
) -> list[float]:
    """Match of a box [left, top, right, bottom] with the reference box.

        r = w_h * hit + w_o * intersection / union + w_c * closeness

    A hit is 1 where the centre of the box lies inside the reference. The closeness is that of `vector_closeness`, with
    scale width for left and right and height for top and bottom.

    Args:
      completions: decoded completions; the compared text must hold exactly four numbers.
      answers: reference boxes.
      width, height: size of the image, in the unit of the numbers.
      tags: tags around the box; "marked" takes the text after `####` or in a LaTeX box; None the whole completion.
      hit_weight, overlap_weight, closeness_weight: w_h, w_o, w_c.

    Returns:
      One reward per row; 0 without four numbers that form a box.

    Raises:
      ValueError: for an invalid reference box.

    >>> [round(r, 6) for r in box_match(["[20, 30, 40, 60]"], ["[25, 25, 45, 50]"], width=100, height=120)]
    [1.211684]

    Reference: GUI-G1 (2505.15810).
    Certainty: verified
    """
    rewards = []
    for row, (text, answer) in enumerate(zip(completions, answers, strict=True)):
        target = _numbers(answer)
        if not _is_box(target):
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which is not a box; write "
                "[left, top, right, bottom]"
            )
        box = _numbers(said(text, tags) or "")
        if not _is_box(box):
            rewards.append(0.0)
            continue
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        hit = target[0] <= x <= target[2] and target[1] <= y <= target[3]
        shared = _overlap(box[::2], target[::2]) * _overlap(box[1::2], target[1::2])
        union = _area(box) + _area(target) - shared
        overlap = shared / union if union else float(box == target)
        closeness = _closeness(box, target, [width, height] * 2)
        rewards.append(hit_weight * hit + overlap_weight * overlap + closeness_weight * closeness)
    return rewards


def span_overlap(completions: Sequence[str], answers: Sequence[str], *, tags: Tags = None) -> list[float]:
    """Intersection over union of two spans [start, end].

        r = length of the intersection / length of the union

    Args:
      completions: decoded completions; the compared text must hold exactly two numbers.
      answers: reference spans.
      tags: as for `box_match`.

    Returns:
      One reward per row in [0, 1]; 0 without a span. Two equal points have overlap 1.

    Raises:
      ValueError: for an invalid reference span.

    >>> span_overlap(["from 2 to 6", "4.5 to 1"], ["[4, 8]", "[0, 1]"])
    [0.3333333333333333, 0.0]
    """
    rewards = []
    for row, (text, answer) in enumerate(zip(completions, answers, strict=True)):
        target, span = _numbers(answer), _numbers(said(text, tags) or "")
        if len(target) != 2 or target[0] > target[1]:
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which is not a span; write [start, end]"
            )
        good = len(span) == 2 and span[0] <= span[1]
        shared = _overlap(span, target) if good else 0.0
        union = span[1] - span[0] + target[1] - target[0] - shared if good else 1.0
        rewards.append(shared / union if union else float(span == target))
    return rewards


@ranged
def vector_closeness(
    completions: Sequence[str], answers: Sequence[str], *, scale: Positive, tags: Tags = None
) -> list[float]:
    """Closeness of a list of numbers to the reference list.

        r = n / sum_k 1 / u_k,   u_k = 1 - |x_k - y_k| / scale

    over n numbers x and those of the reference y; 0 where a u is not above 0.

    Args:
      completions: decoded completions.
      answers: reference lists; text between the numbers is ignored.
      scale: difference at which u is 0.
      tags: as for `box_match`.

    Returns:
      One reward per row in [0, 1]; 0 for another number of numbers.

    Raises:
      ValueError: for a reference without a number.

    >>> [round(r, 6) for r in vector_closeness(["2 5", "2"], ["3 5", "3 5"], scale=10)]
    [0.947368, 0.0]

    Reference: GUI-G1 (2505.15810).
    Certainty: verified
    """
    rewards = []
    for row, (text, answer) in enumerate(zip(completions, answers, strict=True)):
        if not (target := _numbers(answer)):
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which holds no number; write a list of numbers"
            )
        found = _numbers(said(text, tags) or "")
        rewards.append(_closeness(found, target, [scale] * len(target)) if len(found) == len(target) else 0.0)
    return rewards


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _is_box(box: Sequence[float]) -> bool:
    return len(box) == 4 and box[0] <= box[2] and box[1] <= box[3]


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _closeness(one: Sequence[float], other: Sequence[float], scales: Sequence[float]) -> float:
    terms = [1 - abs(a - b) / scale for a, b, scale in zip(one, other, scales, strict=True)]
    return len(terms) / sum(1 / term for term in terms) if min(terms) > 0 else 0.0
