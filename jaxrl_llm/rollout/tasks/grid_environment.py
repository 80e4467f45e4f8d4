"""Grid navigation as JAX functions; `jaxrl_llm.data.tasks.grid` is the same in Python."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrl_llm.data.tokenizer import CharacterTokenizer
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rewards import answer_span
from jaxrl_llm.rollout.environments import Environment, Start, Step

_TOKENIZER = CharacterTokenizer()
_ID = _TOKENIZER.id
_MOVES = ("U", "D", "L", "R")
_DOWN, _RIGHT = (-1, 1, 0, 0), (0, 0, -1, 1)


class GridState(NamedTuple):
    """The state of an episode: the map and the position.

    Attributes:
      wall: whether each cell is a wall.
      place: row and column of the position.
      goal: row and column of the goal.
      distance: smallest number of moves from each cell to the goal; N * N if the goal cannot be reached.
      shortest: distance of the start from the goal.
      turns: number of turns taken.
      reached: whether the goal has been reached.
    """

    wall: Bool[Array, "N N"]
    place: Int[Array, "2"]
    goal: Int[Array, "2"]
    distance: Int[Array, "N N"]
    shortest: Int[Array, ""]
    turns: Int[Array, ""]
    reached: Bool[Array, ""]


@ranged
def grid_navigation(*, size: int = 5, potential: bool = False, max_turn_tokens: Count = 8) -> Environment:
    """Navigation to a goal within 4 N turns; each turn is one move, U, D, L or R between answer tags.

        r = [goal] + (d(before) - d(after)) / d(start)    (the second term only with `potential`)

    The observation is a flag (`.` moved, `x` blocked or invalid, `!` goal) and the cells above, below, left and right.
    A turn that ends the sequence ends the episode.

    Args:
      size: N, number of rows and of columns.
      potential: whether progress is rewarded, as potential-based shaping with the potential -distance / d(start).
      max_turn_tokens: largest number of tokens of a turn.

    Returns:
      The environment. Reference answers must be grids with rows joined by `/`. The metrics are the share of episodes
      that reach the goal, and their optimality d(start) / turns.
    """
    if size < 2:
        raise ValueError(f"size is {size}; a grid needs at least 2 rows")
    wide = size * (size + 1) - 1

    def reset(start: Start, key: Array) -> GridState:
        del key
        if start.answer_tokens.shape[0] < wide:
            raise ValueError(
                f"reference answers have room for {start.answer_tokens.shape[0]} tokens, but a grid of {size} rows has "
                f"{wide}; raise max_answer_tokens (or max_completion_tokens)"
            )
        cells = jnp.append(start.answer_tokens[:wide], _ID("/")).reshape(size, size + 1)[:, :size]
        wall = cells == _ID("#")
        place, goal = (_where(cells == _ID(letter)) for letter in ("S", "G"))
        far = jnp.full((size, size), size * size, jnp.int32).at[goal[0], goal[1]].set(0)

        def nearer(_, distance):
            around = jnp.pad(distance, 1, constant_values=size * size)
            sides = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
            step = jnp.minimum(jnp.stack(sides).min(0) + 1, size * size)
            return jnp.where(wall, size * size, jnp.minimum(distance, step))

        distance = jax.lax.fori_loop(0, size * size, nearer, far)
        shortest = distance[place[0], place[1]]
        return GridState(wall, place, goal, distance, shortest, jnp.int32(0), jnp.bool_(False))

    def step(state: GridState, turn_tokens: Array, turn_length: Array, key: Array) -> Step:
        del key
        first, count, _ = answer_span(turn_tokens[None], turn_length[None])
        letter = jnp.where(count[0] == 1, turn_tokens[first[0]], -1)
        named = letter == jnp.asarray([_ID(move) for move in _MOVES])
        direction = jnp.stack([jnp.asarray(_DOWN), jnp.asarray(_RIGHT)], 1)
        target = state.place + jnp.sum(jnp.where(named[:, None], direction, 0), 0)
        free = named.any() & ~_blocked(state.wall, target)
        place = jnp.where(free, target, state.place).astype(jnp.int32)
        reached = jnp.all(place == state.goal)

        flag = jnp.where(reached, _ID("!"), jnp.where(free, _ID("."), _ID("x")))
        around = [place + direction[k] for k in range(4)]
        seen = [
            jnp.where(jnp.all(cell == state.goal), _ID("G"), jnp.where(_blocked(state.wall, cell), _ID("#"), _ID(".")))
            for cell in around
        ]
        observation = jnp.stack([jnp.int32(_ID("<o>")), flag, *seen, jnp.int32(_ID("</o>"))]).astype(jnp.int32)
        gained = state.distance[state.place[0], state.place[1]] - state.distance[place[0], place[1]]
        progress = gained / jnp.maximum(state.shortest, 1) if potential else 0.0
        ended = turn_tokens[jnp.maximum(turn_length - 1, 0)] == _TOKENIZER.eos_id
        state = state._replace(place=place, turns=state.turns + 1, reached=reached)
        reward = (reached + progress).astype(jnp.float32) if potential else reached.astype(jnp.float32)
        return Step(state, observation, jnp.int32(7), reward, reached | ended)

    def metrics(state: GridState) -> dict[str, tuple[Array, Array]]:
        reached = state.reached.astype(jnp.float32)
        return {
            "goal": (reached, jnp.float32(1.0)),
            "optimality": (reached * state.shortest / jnp.maximum(state.turns, 1), reached),
        }

    return Environment(
        reset=reset,
        step=step,
        max_turns=4 * size,
        max_turn_tokens=max_turn_tokens,
        max_observation_tokens=7,
        end_of_turn_ids=(_ID("<n>"), _TOKENIZER.eos_id),
        metrics=metrics,
        solved=lambda state: state.reached,
    )


def _where(here: Bool[Array, "N N"]) -> Int[Array, "2"]:
    at = jnp.argmax(here.ravel())
    return jnp.stack([at // here.shape[1], at % here.shape[1]]).astype(jnp.int32)


def _blocked(wall: Bool[Array, "N N"], cell: Int[Array, "2"]) -> Bool[Array, ""]:
    """Whether a cell is a wall or outside of the grid."""
    size = wall.shape[0]
    inside = jnp.all((cell >= 0) & (cell < size))
    at = jnp.clip(cell, 0, size - 1)
    return ~inside | wall[at[0], at[1]]
