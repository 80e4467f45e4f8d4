"""Tournaments: ranking the samples of a group by pairwise comparisons."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxrl_llm.ranges import ranged
from jaxrl_llm.rewards.judges.asked import Judge, is_number, parsed_object
from jaxrl_llm.rewards.judges.ratings import asked_judge, require_fields

Scheme = Literal["single_elimination", "round_robin", "anchor", "swiss"]
Pairs = Sequence[tuple[int, int]]
# (pairs of one round) -> (points of the first, points of the second) of each.
Play = Callable[[Pairs], list[tuple[float, float]]]
# Yields the pairs of each round, receives their points, and returns the result of the tournament.
Rounds = Generator[Pairs, list[tuple[float, float]], Any]
MATCH = (
    "Compare two answers to the problem below and give each points from 0 (worst) to 10 (best).\n\n"
    "Problem:\n{prompt}\n\nFirst answer:\n{first}\n\nSecond answer:\n{second}\n\n"
    'Reply with a JSON object and nothing else: {{"first": <points>, "second": <points>}}'
)


def tournament_rewards(size: int, play: Play, *, scheme: Scheme = "single_elimination") -> tuple[list[float], int]:
    """(reward in [0, 1] of each of `size` samples, number of matches).

        round_robin         all pairs play; win 1, tie 1/2; reward (m - rank) / (m - 1), m the last rank
        anchor              all samples play sample 0, ranked by their points in that match
        single_elimination  an anchor round seeds a bracket; reward 1 - position / (size - 1)
        swiss               ceil(log2 size) rounds between players of similar points; ties by the opponents' points

    In the bracket seeds 1 and 2 meet last if size is a power of two; an odd last player advances and is listed first in
    the next round; the player listed first wins a tie.

    Args:
      size: samples of a group, at least 2.
      play: plays the matches of a round.
      scheme: as above.

    Raises:
      ValueError: for fewer than two samples, or an unknown scheme.

    Reference: ArenaRL (2601.06487).
    Certainty: verified
    """
    rounds, played, points = _rounds(size, scheme), 0, None
    try:
        while True:
            pairs = next(rounds) if points is None else rounds.send(points)
            played += len(pairs)
            points = play(pairs)
    except StopIteration as done:
        return done.value, played


def _rounds(size: int, scheme: Scheme) -> Rounds:
    if size < 2:
        raise ValueError(f"a tournament has {size} players; sample at least 2 completions of a prompt")
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is {scheme!r}; it must be one of {', '.join(get_args(Scheme))}")
    if scheme == "round_robin":
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
        points = np.zeros(size)
        for (i, j), (one, two) in zip(pairs, (yield pairs), strict=True):
            points[i] += (one > two) + (one == two) / 2
            points[j] += (two > one) + (one == two) / 2
        return _by_rank(points)
    if scheme == "swiss":
        return (yield from _swiss(size))
    anchored = yield [(0, other) for other in range(1, size)]
    points = np.array([np.mean([one for one, _ in anchored]), *(two for _, two in anchored)])
    if scheme == "anchor":
        return _by_rank(points)
    order = yield from _bracket(points)
    return [1 - order.index(player) / (size - 1) for player in range(size)]


def _by_rank(points: np.ndarray) -> list[float]:
    rank = 1 + (points[None] > points[:, None]).sum(1)
    last = int(rank.max())
    return [0.0] * len(points) if last == 1 else [float((last - r) / (last - 1)) for r in rank]


def _bracket(first: np.ndarray) -> Rounds:
    """Players in their final order."""
    points: dict[int, list[float]] = {player: [float(value)] for player, value in enumerate(first)}
    mean = lambda player: float(np.mean(points[player]))  # noqa: E731
    seeds = sorted(points, key=lambda player: -mean(player))
    places, size = [0], 1
    while size < len(seeds):
        size *= 2
        places = [place for i in places for place in (i, size - 1 - i)]
    players = [seeds[place] for place in places if place < len(seeds)]
    out: list[list[int]] = []
    while len(players) > 1:
        pairs = list(zip(players[::2], players[1::2], strict=False))
        winners, losers = [], []
        for (i, j), (one, two) in zip(pairs, (yield pairs), strict=True):
            points[i].append(one)
            points[j].append(two)
            winners.append(i if one >= two else j)
            losers.append(j if one >= two else i)
        players = ([players[-1]] if len(players) % 2 else []) + winners
        out.append(losers)
    return players + [player for losers in reversed(out) for player in sorted(losers, key=lambda p: -mean(p))]


def _swiss(size: int) -> Rounds:
    points, met = np.zeros(size), defaultdict(set)
    for _ in range(math.ceil(math.log2(size))):
        waiting = sorted(range(size), key=lambda player: -points[player])
        pairs = []
        while len(waiting) > 1:
            one = waiting.pop(0)
            place = next((n for n, other in enumerate(waiting) if other not in met[one]), 0)
            pairs.append((one, waiting.pop(place)))
        if waiting:  # a bye counts as a win
            points[waiting[0]] += 1
        for (i, j), (one, two) in zip(pairs, (yield pairs), strict=True):
            points[i] += (one > two) + (one == two) / 2
            points[j] += (two > one) + (one == two) / 2
            met[i].add(j)
            met[j].add(i)
    opponents = np.array([sum(points[other] for other in met[player]) for player in range(size)])
    return _by_rank(points + opponents / (1 + size * size))


@ranged
def judge_tournament(
    *, judge: Mapping[str, Any] | Judge, scheme: Scheme = "single_elimination", template: str = MATCH
) -> Callable[..., list[float | None]]:
    """A judge compares samples of the same prompt in pairs; the reward is the rank in the tournament.

    Each match is judged in both orders, and the points are added; an unreadable answer counts 5 for both sides. The
    matches of one round of all groups are sent together.

    Args:
      judge: as in `judge_rating`.
      scheme: as in `tournament_rewards`.
      template: question, with {prompt}, {first}, {second}.

    Returns:
      A reading of (prompts, completions, group). A sample without another one in its group has no reward.

    Raises:
      ValueError: for an unknown scheme, or a template with other fields.

    Reference: ArenaRL (2601.06487).
    Certainty: verified
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is {scheme!r}; it must be one of {', '.join(get_args(Scheme))}")
    asked = asked_judge(judge, 1)
    require_fields(template, prompt="", first="", second="")

    def points(text: str) -> tuple[float, float]:
        found = parsed_object(text) or {}
        one, two = found.get("first"), found.get("second")
        if not (is_number(one) and is_number(two) and 0 <= one <= 10 and 0 <= two <= 10):
            return 5.0, 5.0
        return float(one), float(two)

    def judged(prompts: Sequence[str], completions: Sequence[str], group: Sequence[int]) -> list[float | None]:
        members: dict[int, list[int]] = defaultdict(list)
        for row, number in enumerate(group):
            members[int(number)].append(row)

        rewards: list[float | None] = [None] * len(completions)
        going = [(rows, _rounds(len(rows), scheme)) for rows in members.values() if len(rows) > 1]
        waiting = [(rows, rounds, next(rounds)) for rows, rounds in going]
        while waiting:  # one round of all groups together, to use the judge's concurrency
            questions = [
                template.format(prompt=prompts[rows[0]], first=completions[rows[i]], second=completions[rows[j]])
                for rows, _, pairs in waiting
                for pair in pairs
                for i, j in (pair, pair[::-1])
            ]
            said = iter([one for (one,) in asked.ask_all(questions, points)])
            still = []
            for rows, rounds, pairs in waiting:
                both = [(next(said), next(said)) for _ in pairs]
                try:
                    again = rounds.send([(a[0] + b[1], a[1] + b[0]) for a, b in both])
                    still.append((rows, rounds, again))
                except StopIteration as done:
                    for row, reward in zip(rows, done.value, strict=True):
                        rewards[row] = reward
            waiting = still
        return rewards

    judged.report = asked.report  # type: ignore[attr-defined]
    return judged
