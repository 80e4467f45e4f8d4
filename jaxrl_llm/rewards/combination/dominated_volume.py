"""Reward weighting by the hypervolume of several objectives."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rewards.combination.columns import named_columns


def dominated_volume(points: Float[Array, "N K"], there: Bool[Array, "N"]) -> Float[Array, ""]:
    """Volume dominated by the points in `there` above the origin, all objectives maximised.

    The jittable form of `evaluation.hypervolume`.

    >>> round(float(dominated_volume(jnp.array([[0.5, 0.2], [0.3, 0.6]]), jnp.array([True, True]))), 6)
    0.22

    Reference: Dynamic reward weighting (2509.11452).
    Certainty: verified
    """
    there = there & (points > 0).all(1)
    height = jnp.where(there, points[:, -1], 0.0)
    if points.shape[1] == 1:
        return height.max()
    order = jnp.argsort(-height)
    height, points, there = height[order], points[order], there[order]
    slabs = height - jnp.append(height[1:], 0.0)
    upto = jnp.tril(jnp.ones((len(height), len(height)), bool)) & there[None]
    return (slabs * jax.vmap(lambda among: dominated_volume(points[:, :-1], among))(upto)).sum()


@ranged
def hypervolume_guided(
    *,
    objectives: tuple[str, ...],
    reference: Sequence[float],
    reward_names: tuple[str, ...],
    every_steps: Count = 5,
    kept: Count = 32,
) -> Method:
    """Dynamic reward weighting by the hypervolume: rewards times a factor that grows when a step's point enlarges it.

        point = mean over rows of the objectives, of every n-th step
        gain = max(0, HV(points + point) - HV(points)),   factor = 1/2 + 3/2 tanh(gain)

    A point with a gain is kept. The factor cancels where advantages are divided by their deviation: it acts with a
    mean-only baseline (`group_normalized: {scale: none}`).

    Args:
      objectives: names of reward functions, all maximised; at most three, the volume is exact.
      reference: a point below all others, one number per objective.
      reward_names: names of the columns in their order; filled from the run.
      every_steps: n.
      kept: points in memory; the oldest is replaced.

    Returns:
      A method: (rewards, reward_components, weight, step) -> rewards.

    Raises:
      ValueError: for a `reference` of another length than `objectives`, more than three objectives, or an unknown
      reward.

    Reference: Dynamic reward weighting (2509.11452); there the points come from a validation set, here from the step's
    rows.
    Certainty: reconstructed
    """
    if len(reference) != len(objectives) or not 1 <= len(objectives) <= 3:
        raise ValueError(
            f"objectives are {list(objectives)} and reference {list(reference)}; give one to three "
            "objectives and one number for each"
        )
    origin = jnp.asarray(reference, jnp.float32)

    def init() -> dict[str, Array]:
        points = jnp.zeros((kept, len(objectives)), jnp.float32)
        return {"points": points, "count": jnp.int32(0), "factor": jnp.float32(1.0)}

    def update(
        memory: dict[str, Array],
        rewards: Float[Array, "B"],
        reward_components: Float[Array, "B K"],
        weight: Float[Array, "B"],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "B"], dict[str, Array]]:
        columns = jnp.stack(named_columns(reward_components, reward_names, objectives), axis=1)
        counted = (weight > 0)[:, None] & ~jnp.isnan(columns)
        point = jnp.where(counted, columns, 0.0).sum(0) / jnp.maximum(counted.sum(0), 1) - origin
        points, there = memory["points"], jnp.arange(kept) < memory["count"]
        more = jnp.concatenate([points, point[None]]), jnp.append(there, True)
        gain = jnp.maximum(dominated_volume(*more) - dominated_volume(points, there), 0.0)
        measured = step % every_steps == 0
        keeps = measured & (gain > 0)
        place = memory["count"] % kept
        after = {
            "points": jnp.where(keeps, points.at[place].set(point), points),
            "count": memory["count"] + keeps,
            "factor": jnp.where(measured, 0.5 + 1.5 * jnp.tanh(gain), memory["factor"]),
        }
        return rewards * after["factor"], after

    return Method(init, update)
