"""Judgements of single steps or turns of a completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rewards.judges.asked import Judge
from jaxrl_llm.rewards.judges.ratings import asked_judge, mean_vote, require_fields, require_order, stated

STEP = (
    "Judge one step of an answer to the problem below, given the text before it.\n\n"
    "Problem:\n{prompt}\n\nReference answer:\n{answer}\n\nBefore the step:\n{before}\n\nStep:\n{step}\n\n"
    "Reply with a JSON object and nothing else, {lowest} for a wrong or useless step and {highest} for a right one: "
    '{{"rating": <whole number from {lowest} to {highest}>}}'
)


@ranged
def judge_turns(
    *,
    judge: Mapping[str, Any] | Judge,
    tokenizer: Any,
    max_turns: Count,
    template: str = STEP,
    lowest: int = 0,
    highest: int = 1,
    votes: Count = 1,
) -> Callable[..., np.ndarray]:
    """A judge rates each step or turn of a completion, for labels of steps or contributions of utterances.

        label_s = (mean rating - lowest) / (highest - lowest)

    All steps of all rows are sent in one batch. Steps are those of the field `turn` (`step_borders`, `separated_turns`,
    or of an environment); tokens that the policy did not sample are shown as context, not judged.

    Args:
      judge: a judge behind an endpoint, as in `judge_rating`.
      tokenizer: filled from the run.
      max_turns: S; later steps have no label.
      template: question, with {prompt}, {answer}, {before}, {step}, {lowest}, {highest}.
      lowest, highest: of the ratings; 0 to 3 for the contribution of an utterance (Sotopia-RL).
      votes: ratings per step; more than one needs a temperature.

    Returns:
      A reading of (prompts, answers, tokens, length, turn, mask): [B, S], NaN for missing steps and for steps without a
      readable vote.

    Raises:
      ValueError: for a template with other fields, lowest >= highest, or an invalid judge.

    Reference: thought-level process reward (2507.23317); Sotopia-RL (2508.03905); CALM (2409.12798).
    Certainty: recalled
    """
    require_order(lowest, highest)
    require_fields(template, prompt="", answer="", before="", step="", lowest="", highest="")
    asked = asked_judge(judge, votes)

    def judged(
        prompts: Sequence[str],
        answers: Sequence[str],
        tokens: np.ndarray,
        length: np.ndarray,
        turn: np.ndarray,
        mask: np.ndarray,
    ) -> np.ndarray:
        questions, places = [], []
        for row in range(len(prompts)):
            ids, turns, own = (np.asarray(x)[row][: length[row]] for x in (tokens, turn, mask))
            for number in range(max_turns):
                inside = (turns == number) & (own > 0)
                if inside.any():
                    before = tokenizer.decode(ids[: np.argmax(inside)].tolist())
                    step = tokenizer.decode(ids[inside].tolist())
                    facts = {"prompt": prompts[row], "answer": answers[row], "before": before, "step": step}
                    questions.append(template.format(**facts, lowest=lowest, highest=highest))
                    places.append((row, number))
        labels = np.full((len(prompts), max_turns), np.nan, np.float32)
        found = asked.ask_all(questions, partial(stated, lowest=lowest, highest=highest), votes=votes)
        for place, votes_of in zip(places, found, strict=True):
            mean = mean_vote(votes_of)
            labels[place] = np.nan if mean is None else (mean - lowest) / (highest - lowest)
        return labels

    judged.__annotations__["return"] = f'Float[np.ndarray, "B {max_turns}"]'
    judged.report = asked.report  # type: ignore[attr-defined]
    return judged
