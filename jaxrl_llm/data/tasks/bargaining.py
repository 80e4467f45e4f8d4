"""Bargaining in turns: `D:213/402`, a pool of items and their values, to be divided with a scripted partner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from random import Random
from typing import Any, NamedTuple

from jaxrl_llm.data.tasks.items import Item, Segment, Task, equality, observed, tagged

# Largest numbers: kinds of items, units of a kind, value of a unit. Each is one digit.
MOST_KINDS, MOST_UNITS, MOST_WORTH = 4, 3, 4
ACCEPT = "y"
TURNS = 4
# The share of the pool's value (to itself) that the partner demands, in percent: at first, decrease per turn, minimum.
FIRST_PERCENT, CONCESSION, LAST_PERCENT = 80, 10, 50

Units = tuple[int, ...]


class Problem(NamedTuple):
    """A pool: units of each kind, and the value of a unit to the policy (`own`) and to the partner."""

    units: Units
    own: Units
    partner: Units


def problem(answer: str) -> Problem:
    """The problem in a reference answer, which also has the partner's hidden values.

    >>> problem("21/40/13").partner
    (1, 3)
    """
    parts = [tuple(map(int, part)) if part.isdecimal() else () for part in answer.split("/")]
    if len(parts) != 3 or len({len(part) for part in parts}) != 1 or not 1 <= len(parts[0]) <= MOST_KINDS:
        raise ValueError(f"{answer!r} is not a problem of bargaining; it must look like '213/402/132'")
    return Problem(*parts)


def worth(units: Sequence[int], values: Sequence[int]) -> int:
    """The total value of units."""
    return sum(unit * value for unit, value in zip(units, values, strict=True))


def rest(pool: Units, taken: Units) -> Units:
    """The remaining units of a pool."""
    return tuple(unit - gone for unit, gone in zip(pool, taken, strict=True))


def wanted_percent(turn: int) -> int:
    """The demanded share of the pool's value in a turn, in percent.

    >>> [wanted_percent(turn) for turn in range(5)]
    [80, 70, 60, 50, 50]
    """
    return max(FIRST_PERCENT - CONCESSION * turn, LAST_PERCENT)


def enough(units: Units, values: Units, pool: Units, percent: int) -> bool:
    """Whether the value of units is at least `percent` of the value of the pool."""
    return 100 * worth(units, values) >= percent * worth(pool, values)


def nearest(pool: Units, values: Units, percent: int, target: Units) -> Units:
    """The units with the smallest L1 distance to a target among those worth enough; the first of equal ones.

    >>> nearest((2, 1), (1, 3), 80, (1, 0))
    (1, 1)
    """
    found = [each for each in product(*(range(unit + 1) for unit in pool)) if enough(each, values, pool, percent)]
    return min(found, key=lambda each: (sum(abs(a - b) for a, b in zip(each, target, strict=True)), each))


class Episode(NamedTuple):
    """The state of an episode.

    Attributes:
      problem: the pool and its values.
      offer: the units that the partner offers to the policy; none at the start.
      taken: number of turns so far.
      deal: the units of the policy; None before there is a deal.
    """

    problem: Problem
    offer: Units
    taken: int = 0
    deal: Units | None = None


def episode(record: Mapping[str, Any]) -> Episode:
    """The start of an episode."""
    found = problem(record["answer"])
    return Episode(found, (0,) * len(found.units))


def share(problem: Problem, units: Units) -> float:
    """The value of units to the policy, as a share of the value of the pool."""
    return worth(units, problem.own) / worth(problem.units, problem.own)


def proposed(problem: Problem, said: str | None) -> Units | None:
    """The units in a proposal, one digit per kind; None for other text, or more units than the pool has."""
    if said is None or len(said) != len(problem.units) or not (said.isascii() and said.isdecimal()):
        return None
    asked = tuple(map(int, said))
    return asked if all(a <= unit for a, unit in zip(asked, problem.units, strict=True)) else None


def turn(
    state: Episode, text: str, *, max_turns: int = TURNS, progress: bool = False
) -> tuple[Episode, str, float, bool]:
    """(state, observation, reward, whether the episode is over) after a turn's text, its end included."""
    said = tagged(text, "<a>", "</a>")
    said = None if said is None else said.strip(" \n")
    (pool, _, partner), before = state.problem, share(state.problem, state.offer)
    percent, asked = wanted_percent(state.taken), proposed(state.problem, said)
    if said == ACCEPT:
        state = state._replace(deal=state.offer)
    elif asked is not None and enough(rest(pool, asked), partner, pool, percent):
        state = state._replace(deal=asked, offer=asked)
    elif asked is not None:
        state = state._replace(offer=rest(pool, nearest(pool, partner, percent, rest(pool, asked))))
    state = state._replace(taken=state.taken + 1)
    over = state.deal is not None or state.taken == max_turns or text.endswith("<eos>")
    got = share(state.problem, state.deal) if state.deal is not None else 0.0
    after = got if over else share(state.problem, state.offer)
    seen = f"<o>{''.join(map(str, state.offer))}</o>"
    return state, seen, after - before if progress else got, over


def segments(record: Mapping[str, Any]) -> tuple[Segment, ...]:
    """A conversation with the partner's strategy: in each turn the nearest to its offer among units worth enough."""
    state, parts = episode(record), []
    pool, own, _ = state.problem
    while True:
        percent = wanted_percent(state.taken)
        accepts = state.taken == TURNS - 1 or enough(state.offer, own, pool, percent)
        said = ACCEPT if accepts else "".join(map(str, nearest(pool, own, percent, state.offer)))
        text = f"<a>{said}</a><n>"
        state, seen, _, over = turn(state, text)
        parts.append(Segment(text))
        if over:
            return tuple(parts)
        parts.append(observed(seen))


def item(units: Units, own: Units, partner: Units) -> Item:
    """The problem of a pool. Its answer also has the partner's values, which the environment and the reward need.

    >>> item((2, 1), (4, 0), (1, 3)).body
    'D:21/40'
    """
    pool, mine, theirs = ("".join(map(str, part)) for part in (units, own, partner))
    return Item(f"D:{pool}/{mine}", "", f"{pool}/{mine}/{theirs}", "bargaining", len(units), f"bargaining-{len(units)}")


def task() -> Task:
    """Divide two to four kinds of items with a partner whose values are hidden; the level is the number of kinds.

    A turn proposes units of each kind (`<a>201</a>`) or accepts the partner's offer (`<a>y</a>`). The partner accepts
    a proposal that leaves it its demanded share, and otherwise offers the nearest division that does; its demand
    decreases from turn to turn.
    """

    def draw(rng: Random, level: int) -> Item | None:
        units = tuple(rng.randint(1, MOST_UNITS) for _ in range(level))
        own, partner = (tuple(rng.randint(0, MOST_WORTH) for _ in range(level)) for _ in range(2))
        return item(units, own, partner) if any(own) and any(partner) else None

    return Task(
        name="bargaining",
        draw=draw,
        verify=equality,
        levels=(2, 3),
        last_level=MOST_KINDS,
        description="divide things with a partner; the level is the number of their kinds",
        options={},
        scratchpad=False,
        reward="episode_reward",
        identity=lambda item: item.answer,
        segments=segments,
        environment=("bargaining_partner", {}),
    )
