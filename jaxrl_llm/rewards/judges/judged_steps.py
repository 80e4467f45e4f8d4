"""A judge that says of each step of a completion whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rewards.judges.asked import Judge, is_number, parsed_object
from jaxrl_llm.rewards.judges.ratings import asked_judge, require_fields

STEPS = (
    "Decide for each step of the solution below whether it is right, given the problem and its answer. Think about "
    "each step before you decide.\n\nProblem:\n{prompt}\n\nAnswer:\n{answer}\n\nSteps:\n{steps}\n\n"
    'Reply with a JSON object and nothing else: {{"reasons": [a short reason for each step], "labels": [1 or 0 for '
    "each of the {count} steps]}}"
)


@ranged
def judge_steps(
    *, judge: Mapping[str, Any] | Judge, tokenizer: Any, max_turns: Count, template: str = STEPS
) -> Callable[..., list[np.ndarray]]:
    """A judge gives its reasons and a label for each step of a completion: 1 right, 0 wrong.

    All steps of a completion are one question. Fill `turn_labels` with it, behind what fills `turn`; `judged_thoughts`
    reads them, and `labels_at_ends` makes them labels of a process reward model. An answer that cannot be read, or has
    another number of labels, is asked for again as in `judge_rating`, and then leaves the row without labels.

    Args:
      judge: `{url: ..., model: ...}`, with fields of `Endpoint` and `Judge`.
      tokenizer: filled from the run.
      max_turns: steps that are asked about, S; those behind have no label.
      template: question, with {prompt}, {answer}, {steps} and {count}.

    Returns:
      A reading of (prompts, answers, tokens, length, turn): S labels a row, NaN where there is none.

    Raises:
      ValueError: for a template with other fields, or a judge that is not described well.

    Reference: thought-level process reward (2507.23317), generative judges of steps (2504.00891).
    Certainty: recalled
    """
    asked = asked_judge(judge, 1)
    require_fields(template, prompt="", answer="", steps="", count="")
    pieces = [piece or b"" for piece in tokenizer.token_bytes()]

    def judged(
        prompts: Sequence[str], answers: Sequence[str], tokens: np.ndarray, length: np.ndarray, turn: np.ndarray
    ) -> list[np.ndarray]:
        found, questions = [np.full(max_turns, np.nan, np.float32) for _ in prompts], []
        for prompt, answer, row, count, numbers in zip(prompts, answers, tokens, length, turn, strict=True):
            texts = step_texts([pieces[token] for token in row[:count]], numbers[:count], max_turns)
            steps = "\n".join(f"{place + 1}. {text}" for place, text in enumerate(texts))
            questions.append((template.format(prompt=prompt, answer=answer, steps=steps, count=len(texts)), len(texts)))
        for count in sorted({count for _, count in questions if count}):
            rows = [row for row, (_, own) in enumerate(questions) if own == count]
            told = asked.ask_all([questions[row][0] for row in rows], lambda text, n=count: step_labels(text, n))
            for row, (labels,) in zip(rows, told, strict=True):
                if labels is not None:
                    found[row][:count] = labels
        return found

    judged.report = asked.report  # type: ignore[attr-defined]
    return judged


def step_texts(pieces: Sequence[bytes], turn: Sequence[int], turns: int) -> list[str]:
    """The text of each step up to the last one that is asked about.

    >>> step_texts([b"a", b"b;", b"c"], [0, 0, 1], 4)
    ['ab;', 'c']
    """
    count = min(int(max(turn, default=-1)) + 1, turns)
    parts = [b"".join(p for p, number in zip(pieces, turn, strict=True) if number == step) for step in range(count)]
    return [part.decode(errors="replace") for part in parts]


def step_labels(text: str, count: int) -> list[float] | None:
    """The labels in a judge's answer; None where there are not so many numbers of 0 and 1.

    >>> step_labels('{"labels": [1, 0]}', 2), step_labels('{"labels": [1]}', 2)
    ([1.0, 0.0], None)
    """
    labels = (parsed_object(text) or {}).get("labels")
    if not isinstance(labels, list) or len(labels) != count:
        return None
    return [float(x) for x in labels] if all(is_number(x) and x in (0, 1) for x in labels) else None
