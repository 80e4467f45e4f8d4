"""Grid navigation in turns: `G:S.#/.#./..G`, one move per turn; the observation has the neighbouring cells."""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, Literal, NamedTuple

from jaxrl_llm.data.tasks.items import Item, Segment, Task, observed, require_choice, require_int, require_share, tagged

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
View = Literal["full", "blind"]


class Place(NamedTuple):
    """A cell."""

    row: int
    column: int


class Moved(NamedTuple):
    """The result of a move.

    Attributes:
      place: the position after the move.
      observation: flag (`.` moved, `x` blocked or no move, `!` goal) and the cells above, below, left and right.
      reached: the goal is reached.
    """

    place: Place
    observation: str
    reached: bool


def find(rows: Sequence[str], letter: str) -> Place:
    """The cell with a letter.

    Raises:
      ValueError: if there is none.
    """
    for row, cells in enumerate(rows):
        if letter in cells:
            return Place(row, cells.index(letter))
    raise ValueError(f"the grid {'/'.join(rows)!r} has no {letter!r}; it needs one S and one G")


def cell(rows: Sequence[str], place: Place) -> str:
    """The visible content of a cell: `.`, `#` or `G`; cells outside are `#`, and the start is shown as a free cell."""
    row, column = place
    inside = 0 <= row < len(rows) and 0 <= column < len(rows)
    return rows[row][column].replace("S", ".") if inside else "#"


def neighbour(place: Place, move: str) -> Place:
    """The target cell of a move."""
    down, right = MOVES[move]
    return Place(place.row + down, place.column + right)


def observation(rows: Sequence[str], place: Place, flag: str = ".") -> str:
    """The flag and the four neighbouring cells.

    >>> observation(["S.#", ".#.", "..G"], Place(0, 0))
    '.#.#.'
    """
    return flag + "".join(cell(rows, neighbour(place, move)) for move in MOVES)


def moved(rows: Sequence[str], place: Place, move: str | None) -> Moved:
    """The result of one turn; without a valid move, or with a move into a wall, the position does not change."""
    target = neighbour(place, move) if move in MOVES else None
    if target is None or cell(rows, target) == "#":
        return Moved(place, observation(rows, place, "x"), False)
    reached = cell(rows, target) == "G"
    return Moved(target, observation(rows, target, "!" if reached else "."), reached)


class Episode(NamedTuple):
    """The state of an episode: the grid and the position."""

    rows: tuple[str, ...]
    place: Place


def episode(record: Mapping[str, Any]) -> Episode:
    """The start of an episode."""
    rows = tuple(record["answer"].split("/"))
    return Episode(rows, find(rows, "S"))


def turn(state: Episode, text: str) -> tuple[Episode, str, float, bool]:
    """(state, observation, reward, whether the episode is over) after a turn's text, its end included."""
    move = tagged(text, "<a>", "</a>")
    place, seen, reached = moved(state.rows, state.place, None if move is None else move.strip(" \n"))
    return state._replace(place=place), f"<o>{seen}</o>", float(reached), reached or text.endswith("<eos>")


def distances(rows: Sequence[str], source: Place) -> dict[Place, int]:
    """Length of the shortest path from a cell to every reachable cell."""
    found, waiting = {source: 0}, deque([source])
    while waiting:
        place = waiting.popleft()
        for move in MOVES:
            target = neighbour(place, move)
            if target not in found and cell(rows, target) != "#":
                found[target] = found[place] + 1
                waiting.append(target)
    return found


def shortest_path(rows: Sequence[str]) -> str:
    """The shortest path from S to G; among several, the first in the order of `MOVES` at every step.

    >>> shortest_path(["S.#", ".#.", "..G"])
    'DDRR'
    """
    place, goal = find(rows, "S"), find(rows, "G")
    left, moves = distances(rows, goal), ""
    while place != goal:
        move = next(m for m in MOVES if left.get(neighbour(place, m), len(left)) == left[place] - 1)
        place, moves = neighbour(place, move), moves + move
    return moves


def verify(item: Item, answer: str | None) -> float:
    """1 if the moves reach the goal within 4 turns per row of the grid, else 0."""
    rows = item.answer.split("/")
    place = find(rows, "S")
    for move in (answer or "")[: 4 * len(rows)]:
        place, _, reached = moved(rows, place, move)
        if reached:
            return 1.0
    return 0.0


def moves(completion: str) -> str | None:
    """The valid moves of a conversation; None if no turn has an answer.

    >>> moves("<a>D</a><n><o>...##</o><a>R</a><n>")
    'DR'
    """
    answers = [turn.strip(" \n") for turn in re.findall("<a>([^<]*)</a>", completion)]
    return "".join(answer for answer in answers if answer in MOVES) if answers else None


def item(rows: Sequence[str], *, view: View = "full") -> Item:
    """The problem of a grid. Its answer is the grid, which the verifier needs even if the prompt does not show it.

    >>> item(["S.#", ".#.", "..G"]).body
    'G:S.#/.#./..G<o>.#.#.</o>'
    """
    text, level = "/".join(rows), len(shortest_path(rows))
    shown = text if view == "full" else str(len(rows))
    body = f"G:{shown}<o>{observation(rows, find(rows, 'S'))}</o>"
    return Item(body, "", text, "grid", level, f"grid-{level}")


def segments(record: Mapping[str, Any], *, detours: float = 0.0) -> tuple[Segment, ...]:
    """The shortest path as a conversation: one move per turn, each but the last followed by its observation.

    A share `detours` of the conversations, by the hash of the grid, starts with a blocked move, which is then corrected
    and is not trained on.
    """
    rows = record["answer"].split("/")
    place, parts = find(rows, "S"), []
    erring = zlib.crc32(record["answer"].encode()) % 1000 < 1000 * detours
    for move in shortest_path(rows):
        blocked = [other for other in MOVES if cell(rows, neighbour(place, other)) == "#"]
        if erring and blocked:
            parts += [Segment(f"<a>{blocked[0]}</a><n>", trained=False)]
            parts += [observed(f"<o>{moved(rows, place, blocked[0]).observation}</o>")]
            erring = False
        place, seen, _ = moved(rows, place, move)
        parts += [Segment(f"<a>{move}</a><n>"), observed(f"<o>{seen}</o>")]
    # The episode ends at the goal, so there is no last observation.
    return tuple(parts[:-1])


def task(*, size: int = 5, wall_probability: float = 0.2, view: str = "full", detours: float = 0.0) -> Task:
    """Find the goal in a grid, one move per turn; the level is the length of the shortest path.

    Args:
      size: rows and columns, 3 to 7.
      wall_probability: of each cell, 0 to 0.3.
      view: the prompt shows the whole grid ("full"), or only its size ("blind").
      detours: share of the reference conversations that make a blocked move and correct it (Mobile-R1).
    """
    require_share("detours", detours)
    require_int("size", size, low=3, high=7)
    require_share("wall_probability", wall_probability, high=0.3)
    require_choice("view", view, ("full", "blind"))

    def draw(rng: Random, level: int) -> Item | None:
        for _ in range(20):
            grid = [["#" if rng.random() < wall_probability else "." for _ in range(size)] for _ in range(size)]
            free = [Place(r, c) for r in range(size) for c in range(size) if grid[r][c] == "."]
            if len(free) < 2:
                continue
            start = rng.choice(free)
            goals = [place for place, far in distances(["".join(row) for row in grid], start).items() if far == level]
            # Accepted with the share of free cells at this distance, as if the goal were drawn from all free cells.
            if rng.random() * (len(free) - 1) < len(goals):
                goal = rng.choice(goals)
                grid[start.row][start.column], grid[goal.row][goal.column] = "S", "G"
                return item(["".join(row) for row in grid], view="full" if view == "full" else "blind")
        return None

    return Task(
        name="grid",
        draw=draw,
        verify=verify,
        levels=tuple(range(1, 2 * size - 1)),
        last_level=2 * size,
        description="find the goal, one move a turn; the level is the length of the shortest path",
        options={"size": size, "wall_probability": wall_probability, "view": view}
        | ({"detours": detours} if detours else {}),
        scratchpad=False,
        reward="episode_reward",
        identity=lambda item: f"{item.answer}:{view}",
        segments=partial(segments, detours=detours),
        said=moves,
        environment=("grid_navigation", {"size": size}),
    )
