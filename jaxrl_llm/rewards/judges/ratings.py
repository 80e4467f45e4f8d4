"""Pointwise judgements: ratings, expected ratings, rubrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rewards.judges.asked import Judge, is_number, judge_of, parsed_object

RATING = (
    "Rate the answer to the problem below from {lowest} (worst) to {highest} (best).\n\n"
    "Problem:\n{prompt}\n\nAnswer:\n{completion}\n\n"
    'Reply with a JSON object and nothing else: {{"rating": <whole number from {lowest} to {highest}>}}'
)
CRITERION = (
    "Decide whether the answer to the problem below meets the criterion.\n\n"
    "Problem:\n{prompt}\n\nAnswer:\n{completion}\n\nCriterion:\n{criterion}\n\n"
    'Reply with a JSON object and nothing else: {{"met": true}} or {{"met": false}}'
)


@ranged
def judge_rating(
    *,
    judge: Mapping[str, Any] | Judge,
    template: str = RATING,
    lowest: int = 1,
    highest: int = 5,
    votes: Count = 1,
    system: str | None = None,
    after: str = "",
) -> Callable[..., list[float | None]]:
    """A judge rates each completion; the reward is the mean of its votes, scaled to [0, 1].

        r = (mean rating - lowest) / (highest - lowest)

    A vote that cannot be parsed, or lies out of range, is repeated (not at temperature 0) and then left out; without a
    readable vote the reward does not apply. A middle value instead would bias baselines.

    Args:
      judge: `{url: ..., model: ...}`, with fields of `Endpoint` and `Judge`; or `{network: NAME}` of the run, with
        `max_completion_tokens`, `max_prompt_tokens` and `temperature`, whose verdict is sampled within the step.
      template: question, with {prompt}, {completion}, {answer}, {lowest}, {highest}.
      lowest, highest: of the ratings.
      votes: ratings per completion; more than one needs a temperature.
      system: system message.
      after: as in `stated_rating`, for a judge that states its reasons first.

    Returns:
      A reading of (prompts, completions, answers), or of the network's text.

    Raises:
      ValueError: for a template with other fields, lowest >= highest, or an invalid judge.

    Reference: LLM as a judge (2306.05685).
    Certainty: recalled
    """
    require_order(lowest, highest)
    require_fields(template, prompt="", completion="", answer="", lowest="", highest="")

    def questions(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[str]:
        return [
            template.format(prompt=p, completion=c, answer=a, lowest=lowest, highest=highest)
            for p, c, a in zip(prompts, completions, answers, strict=True)
        ]

    if isinstance(judge, Mapping) and "network" in judge:
        if votes > 1 or system:
            raise ValueError("votes and system are of a judge behind an endpoint; leave them out for judge.network")
        return written_verdict(judge, questions, partial(stated_rating, lowest=lowest, highest=highest, after=after))
    asked = asked_judge(judge, votes)
    rating = partial(stated, lowest=lowest, highest=highest, after=after)

    def judged(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        found = asked.ask_all(questions(prompts, completions, answers), rating, votes=votes, system=system)
        means = [mean_vote(one) for one in found]
        return [None if mean is None else (mean - lowest) / (highest - lowest) for mean in means]

    judged.report = asked.report  # type: ignore[attr-defined]
    return judged


def stated_rating(
    verdict_text: Sequence[str | None], *, lowest: int = 1, highest: int = 5, after: str = ""
) -> list[float | None]:
    """The rating in a network's text, scaled to [0, 1]; None where it cannot be read.

        r = (rating - lowest) / (highest - lowest)

    Args:
      verdict_text: the network's text: a JSON object with `rating`, or the number alone.
      lowest, highest: of the ratings.
      after: a text before the rating; only the text after its last occurrence is read, and without it there is no
        rating.

    Raises:
      ValueError: if lowest >= highest.

    Reference: LLM as a judge (2306.05685).
    Certainty: recalled
    """
    require_order(lowest, highest)
    found = [
        None if text is None else stated(text, lowest=lowest, highest=highest, after=after) for text in verdict_text
    ]
    return [None if one is None else (one - lowest) / (highest - lowest) for one in found]


def require_order(lowest: float, highest: float) -> None:
    """Raise ValueError unless the lowest rating is below the highest."""
    if lowest >= highest:
        raise ValueError(f"highest is {highest} and lowest is {lowest}; highest must be above lowest")


def stated(text: str, *, lowest: int, highest: int, after: str = "") -> float | None:
    """The rating that an answer states, as a JSON object with `rating` or the number alone; None for none in range."""
    if after:
        _, there, text = text.rpartition(after)
        if not there:
            return None
    found: Any = (parsed_object(text) or {}).get("rating")
    if found is None and text.strip().isdecimal() and len(text.strip()) < 10:
        found = int(text)
    return float(found) if is_number(found) and lowest <= found <= highest else None


def written_verdict(judge: Mapping[str, Any], questions: Callable[..., list[str]], parse: Callable[..., Any]) -> Any:
    """A reading of the verdict that a network of the run samples, with its view as attribute `written_view`.

    Raises:
      ValueError: for an unknown field of the judge.
    """
    known = ("network", "max_completion_tokens", "max_prompt_tokens", "temperature")
    for name in judge:
        if name not in known:
            raise ValueError(f"judge.{name} is not a field of a judge that is a network; it has {', '.join(known)}")
    described = {name: value for name, value in judge.items() if name != "network"}
    view = {"temperature": 0.0, "max_completion_tokens": 16, **described, "written_by": judge["network"]}
    parse.written_view = {"function": questions, **view}  # type: ignore[attr-defined]
    return parse


@ranged
def expected_rating(
    rating_probs: Float[Array, "B K"], *, lowest: float = 1.0, highest: float = 5.0
) -> Float[Array, "B"]:
    """The expectation of a rating under a judge's probabilities of the rating tokens, scaled to [0, 1].

        E = sum_k k p_k / sum_k p_k,   r = (E - lowest) / (highest - lowest)

    Args:
      rating_probs: probability of each rating from lowest to highest; they need not sum to 1.
      lowest, highest: of the ratings.

    Returns:
      One reward per row; NaN (does not apply) where all ratings have probability 0.

    Raises:
      ValueError: if lowest >= highest.

    Reference: LLM as a judge (2306.05685).
    Certainty: recalled
    """
    require_order(lowest, highest)
    chex.assert_rank(rating_probs, 2)
    ratings = jnp.linspace(lowest, highest, rating_probs.shape[1])
    mass = rating_probs.sum(axis=1)
    expected = (ratings * rating_probs).sum(axis=1) / jnp.where(mass > 0, mass, 1.0)
    return jnp.where(mass > 0, (expected - lowest) / (highest - lowest), jnp.nan)


def rubric_score(met: Sequence[Any], points: Sequence[float], *, clip: bool = False) -> float:
    """Earned points of a rubric divided by its positive points; negative points are penalties.

        s = sum_k met_k points_k / sum_{k: points_k > 0} points_k,   0 without positive points

    Args:
      met: whether each criterion is met.
      points: points of each criterion.
      clip: into [0, 1], for reports.

    >>> rubric_score([1, 0, 1, 1], [5, 3, 2, -4])
    0.3

    Reference: rubrics as rewards (2507.17746).
    Certainty: verified
    """
    most = sum(value for value in points if value > 0)
    if most == 0:
        return 0.0
    score = sum(value for hit, value in zip(met, points, strict=True) if hit) / most
    return min(1.0, max(0.0, score)) if clip else score


@ranged
def judge_rubric(
    *, judge: Mapping[str, Any] | Judge, template: str = CRITERION, votes: Count = 1, clip: bool = False
) -> Callable[..., list[float | None]]:
    """A judge decides for each criterion of the problem's rubric whether the completion meets it.

    The reward is `rubric_score`. The rubric is the data's column `rubric`: a list of {criterion, points}. A criterion
    without a readable vote leaves the row without a reward.

    Args:
      judge: as in `judge_rating`.
      template: question, with {prompt}, {completion}, {criterion}.
      votes: votes per criterion, decided by majority; a tie counts as not met.
      clip: as in `rubric_score`.

    Returns:
      A reading of (prompts, completions, rubric).

    Raises:
      ValueError: for a template with other fields; when called, for an invalid rubric.

    Reference: OpenRubrics (2510.07743); RuscaRL (2508.16949).
    Certainty: recalled
    """
    asked = asked_judge(judge, votes)
    require_fields(template, prompt="", completion="", criterion="")

    def met(text: str) -> bool | None:
        found = (parsed_object(text) or {}).get("met")
        return found if isinstance(found, bool) else None

    def judged(prompts: Sequence[str], completions: Sequence[str], rubric: Sequence[Any]) -> list[float | None]:
        rubrics = [require_rubric(one, row) for row, one in enumerate(rubric)]
        questions = [
            template.format(prompt=p, completion=c, criterion=criterion)
            for p, c, criteria in zip(prompts, completions, rubrics, strict=True)
            for criterion, _ in criteria
        ]
        verdicts = iter(asked.ask_all(questions, met, votes=votes))
        scores: list[float | None] = []
        for criteria in rubrics:
            shares = [mean_vote(next(verdicts)) for _ in criteria]
            known = all(share is not None for share in shares)
            hits = [share is not None and share > 0.5 for share in shares]
            scores.append(rubric_score(hits, [points for _, points in criteria], clip=clip) if known else None)
        return scores

    judged.report = asked.report  # type: ignore[attr-defined]
    return judged


def require_rubric(rubric: Any, row: int) -> list[tuple[str, float]]:
    """A rubric as (criterion, points) pairs.

    Raises:
      ValueError: for anything but a list of {criterion, points} with finite points.
    """
    entries = rubric if isinstance(rubric, Sequence) and not isinstance(rubric, str) else None
    for entry in entries or [None]:
        described = entry if isinstance(entry, Mapping) else {}
        if not isinstance(described.get("criterion"), str) or not is_number(described.get("points")):
            raise ValueError(
                f"the rubric of row {row} holds {str(entry)[:80]!r}; it must be a list of "
                '{"criterion": text, "points": number}'
            )
    return [(str(entry["criterion"]), float(entry["points"])) for entry in entries or () if entry is not None]


def consistent_criteria(
    verdicts: Sequence[Sequence[int]], labels: Sequence[int], *, least_rate: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(share of verdicts that name the preferred answer, whether the criteria are kept) for each pair.

    Args:
      verdicts: verdicts of the judge on each pair under the criteria, several per pair.
      labels: the preferred answer of each pair.
      least_rate: smallest share of criteria that are kept.

    Reference: OpenRubrics (2510.07743).
    Certainty: recalled
    """
    rate = np.array([np.mean([v == label for v in one]) for one, label in zip(verdicts, labels, strict=True)])
    return rate, rate >= least_rate


def require_fields(template: str, **known: str) -> None:
    """Raise ValueError for a template with other fields."""
    try:
        template.format(**known)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"template cannot be filled ({type(error).__name__}: {error}); it may name {', '.join(sorted(known))} in "
            "braces, and writes a brace of its own twice"
        ) from None


def asked_judge(described: Mapping[str, Any] | Judge, votes: int) -> Judge:
    asked = described if isinstance(described, Judge) else judge_of(described, "judge")
    if votes > 1 and asked.temperature == 0:
        raise ValueError(
            f"votes is {votes} with judge.temperature 0, which gives equal votes; raise the temperature, or take 1 vote"
        )
    return asked


def mean_vote(values: Sequence[Any]) -> float | None:
    """Mean of the readable votes; None without any."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
