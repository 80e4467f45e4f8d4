"""Two attempts at one problem: a first response, a fixed request to revise it, a second response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

from jaxrl_llm.data.tasks import addition, chain, corruption, deduction
from jaxrl_llm.data.tasks.items import Item, Segment, Task, equality, observed, require_choice, require_share, tagged

REVISE = "<r>\n"
PROBLEMS = {
    "addition": (addition.task, corruption.random_addition),
    "chain": (chain.task, corruption.random_chain),
    "deduction": (deduction.task, corruption.random_deduction),
}


def attempt(think: str, answer: str, scratchpad: bool) -> str:
    """One response, without the end of its turn."""
    return (f"<t>{think}</t>" if scratchpad else "") + f"<a>{answer}</a>"


class Episode(NamedTuple):
    """The state of an episode: the reference answer and the attempts so far."""

    answer: str
    taken: int = 0


def episode(record: Mapping[str, Any]) -> Episode:
    """The start of an episode."""
    return Episode(record["answer"])


def turn(state: Episode, text: str) -> tuple[Episode, str, float, bool]:
    """(state, observation, reward, whether the episode is over) after a turn's text, its end included."""
    answer = tagged(text, "<a>", "</a>")
    right = answer is not None and answer.strip(" \n") == state.answer
    return state._replace(taken=state.taken + 1), REVISE, float(right), state.taken >= 1


def task(
    *, problem: str = "addition", corrupted: float = 0.5, problem_options: Mapping[str, Any] | None = None
) -> Task:
    """A problem of another family, attempted twice; levels and splits are those of that family.

    In reference conversations some first attempts are wrong; these attempts are not trained on.

    Args:
      problem: "addition", "chain" or "deduction".
      corrupted: share of wrong first attempts, 0 to 1; an item always has the same attempt.
      problem_options: options of the other family.
    """
    require_choice("problem", problem, tuple(PROBLEMS))
    require_share("corrupted", corrupted)
    if problem_options is not None and not isinstance(problem_options, Mapping):
        raise ValueError(f"problem_options is {problem_options!r}; it must map options of {problem} to their values")
    family, wrong_attempt = PROBLEMS[problem]
    try:
        inner = family(**dict(problem_options or {}))
    except TypeError as error:
        raise ValueError(f"problem_options is {problem_options!r}, which {problem} does not accept: {error}") from error

    def draw(rng: Random, level: int) -> Item | None:
        drawn = inner.draw(rng, level)
        return None if drawn is None else replace(drawn, task="self_correction", domain=f"self_correction-{level}")

    def segments(record: Mapping[str, Any]) -> tuple[Segment, ...]:
        body, think, answer = record["body"], record["think"], record["answer"]
        rng = Random(body)
        wrong = rng.random() < corrupted
        first = wrong_attempt(rng, body, think, answer) if wrong else corruption.Attempt(think, answer)
        return (
            Segment(attempt(first.think, first.answer, inner.scratchpad) + "<n>", trained=not wrong),
            observed(REVISE),
            Segment(attempt(think, answer, inner.scratchpad) + "<eos>"),
        )

    return Task(
        name="self_correction",
        draw=draw,
        verify=equality,
        levels=inner.levels,
        last_level=inner.last_level,
        description=f"two attempts at a problem of {problem}; the level is that of the problem",
        options={"problem": problem, "corrupted": corrupted, "problem_options": dict(inner.options)},
        scratchpad=inner.scratchpad,
        reward="episode_reward",
        segments=segments,
        environment=("two_attempts", {}),
    )
