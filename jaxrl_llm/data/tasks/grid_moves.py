"""Logged states of grid navigation: observations so far -> the next move of a shortest path, as a single turn."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from jaxrl_llm.data.tasks import grid
from jaxrl_llm.data.tasks.items import Item, Task, equality, record


def task(*, size: int = 5, wall_probability: float = 0.2) -> Task:
    """One move of `grid`, given the turns before it; the level is the length of the whole path.

    The prompt is the grid, then a random number of turns of the shortest path with the environment's observations.

    Args:
      size: rows and columns, 3 to 7.
      wall_probability: of each cell, 0 to 0.3.
    """
    episodes = grid.task(size=size, wall_probability=wall_probability)

    def draw(rng: Random, level: int) -> Item | None:
        episode = episodes.draw(rng, level)
        if episode is None:
            return None
        turn = rng.randrange(level)
        parts = grid.segments(record(episode, 0))
        history = "".join(part.text for part in parts[: 2 * turn])
        move = grid.shortest_path(episode.answer.split("/"))[turn]
        return replace(episode, body=episode.body + history, answer=move, task="grid_moves", domain=f"moves-{level}")

    return Task(
        name="grid_moves",
        draw=draw,
        verify=equality,
        levels=episodes.levels,
        last_level=episodes.last_level,
        description="the next move in a grid, given those before; the level is the length of the path",
        options={"size": size, "wall_probability": wall_probability},
        scratchpad=False,
        # One state of each grid, in the split of the grid, so that no test grid of `grid` is a training problem here.
        identity=lambda item: f"{item.body.removeprefix('G:').split('<o>')[0]}:full",
    )
