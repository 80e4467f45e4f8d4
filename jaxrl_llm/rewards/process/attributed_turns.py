"""Turn rewards from a judge's ratings: shares of the outcome, and bonuses for reached subgoals."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, ranged

Attribution = Literal["scaled", "share"]


@ranged
def attributed_turns(
    contributions: Float[Array, "B S ..."],
    correct: Float[Array, "B ..."],
    *,
    form: Attribution = "scaled",
    lowest: float | tuple[float, ...] = 0.0,
    highest: float | tuple[float, ...] = 1.0,
    scale: float = 1.0,
    unrated: float = 0.0,
) -> Float[Array, "B S"]:
    """The outcome of an episode, distributed over its turns by their contributions in one or several dimensions.

        scaled   r_ds = c_ds * e_d
        share    r_ds = c_ds * e_d / sum_s c_ds,   0 where nothing contributed
        r_s = scale * mean_d (r_ds - lowest_d) / (highest_d - lowest_d)

    Args:
      contributions: c in [0, 1], such as `judge_turns` with ratings 0 to 3; one per turn, or one per turn and
        dimension. Negative or NaN: unrated.
      correct: e, the outcome; one per row, or one per row and dimension.
      form: as above.
      lowest, highest: of r_d over the whole data, frozen; one number, or one per dimension.
      scale: factor of the result (10 in the authors' code).
      unrated: reward of a turn that is unrated in any dimension (-1 in the authors' code, which leaves the turn out).

    Returns:
      One reward per turn, float32.

    Raises:
      ValueError: for an unknown form, or a dimension with highest <= lowest.

    Reference: Sotopia-RL (2508.03905).
    Certainty: verified
    """
    if form not in get_args(Attribution):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Attribution))}")
    ends = [(end,) if isinstance(end, int | float) else tuple(end) for end in (lowest, highest)]
    if len(ends[0]) != len(ends[1]) or any(high <= low for low, high in zip(*ends, strict=True)):
        raise ValueError(f"highest is {highest} and lowest is {lowest}; highest must be above lowest in each dimension")
    c = contributions[..., None] if contributions.ndim == 2 else contributions
    e = correct[:, None] if correct.ndim == 1 else correct
    chex.assert_rank([c, e], [3, 2])
    known = c >= 0
    c = jnp.where(known, c.astype(jnp.float32), 0.0)
    if form == "share":
        total = c.sum(1, keepdims=True)
        c = c / jnp.where(total > 0, total, 1.0)
    low, high = (jnp.asarray(end, jnp.float32) for end in ends)
    rewards = scale * ((c * e.astype(jnp.float32)[:, None] - low) / (high - low)).mean(-1)
    return jnp.where(known.all(-1), rewards, unrated)


@ranged
def subgoal_rewards(
    hits: Float[Array, "B S ..."], turn_rewards: Float[Array, "B S"], *, coefficient: NonNegative, once: bool = True
) -> Float[Array, "B S"]:
    """Rewards of turns with a bonus for each subgoal that the turn reaches.

        u_s = r_s + coefficient * sum_k hit_sk,   only the first hit of each subgoal k of an episode with `once`

    Args:
      hits: 1 where turn s reaches subgoal k, from a judge or the task; without the last axis for one subgoal. NaN is no
        hit; missing turns have no hit.
      turn_rewards: r, the rewards of the task.
      coefficient: reward per hit; keep it below the outcome's reward divided by twice the number of subgoals.
      once: count each subgoal at most once; otherwise hits can be farmed.

    Returns:
      One reward per turn, float32.

    Raises:
      ValueError: for a negative coefficient.

    Reference: CALM (2409.12798).
    Certainty: recalled
    """
    turns = turn_rewards.shape[1]
    hit = ((hits[..., None] if hits.ndim == 2 else hits) > 0)[:, :turns]
    chex.assert_rank([hit, turn_rewards], [3, 2])
    hit = jnp.pad(hit, ((0, 0), (0, turns - hit.shape[1]), (0, 0)))
    if once:
        hit = hit & (jnp.cumsum(hit, axis=1) == 1)
    return turn_rewards.astype(jnp.float32) + coefficient * hit.sum(-1)
