"""Majority vote over the text answers of all samples of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxrl_llm.rewards.verifiers.text_answers import extract_answer


def voted_answer(completions: Sequence[str], group: Sequence[int]) -> list[float]:
    """1 where the completion has the majority answer of its group, else 0.

        label = argmax_a #{i : a_i = a}, ties to the first sampled;   r_i = 1[a_i = label]

    A completion without an answer neither votes nor matches.

    As a reward function it sees all samples of a plan (`voted`), including those not trained on.

    Args:
      completions: decoded completions.
      group: id of the prompt of each.

    Returns:
      One reward per row, 0 or 1.

    >>> voted_answer(["<a>3</a>", "<a>5</a>", "", "<a>5 </a>"], [0, 0, 0, 0])
    [0.0, 1.0, 0.0, 1.0]

    Reference: TTRL (2504.16084).
    Certainty: verified
    """
    answers = [extract_answer(text) or None for text in completions]
    votes: dict[int, Counter] = {}
    for answer, number in zip(answers, group, strict=True):
        votes.setdefault(int(number), Counter()).update([] if answer is None else [answer])
    labels = {number: max(counts, key=counts.__getitem__, default=None) for number, counts in votes.items()}
    return [
        float(answer is not None and answer == labels[int(number)])
        for answer, number in zip(answers, group, strict=True)
    ]
