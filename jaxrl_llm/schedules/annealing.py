"""Coefficients that fall with the steps of a run."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, Natural, NonNegative, Share, ranged


@ranged
def annealed_share(
    step: Int[Array, ""] | int,
    *,
    scale: NonNegative = 0.01,
    start_step: Natural = 50,
    steps_per_drop: Count = 10,
    drop: NonNegative = 0.1,
    least: Share = 0.5,
    complement: bool = False,
) -> Float[Array, ""]:
    """Coefficient of one of two anchors in a convex combination; the share of the reference falls with the steps.

        share = max(1 - drop * ceil(max(step - start_step, 0) / steps_per_drop), least)
        coefficient = scale * (1 - share) if `complement`, else scale * share

    Args:
      step: updates made so far.
      scale: coefficient of the whole combination.
      start_step: step up to which the share is 1.
      steps_per_drop: steps between two decreases of the share.
      drop: amount of each decrease.
      least: smallest share.
      complement: return the coefficient of the other anchor.

    Returns:
      A coefficient for a loss term.

    Raises:
      ValueError: for a hyper-parameter out of range.

    Reference: ReMix (2507.06892).
    Certainty: recalled
    """
    late = jnp.maximum(jnp.asarray(step, jnp.float32) - start_step, 0.0)
    share = jnp.maximum(1.0 - drop * jnp.ceil(late / steps_per_drop), least)
    return scale * (1.0 - share if complement else share)


@ranged
def two_phase_decay(step: Int[Array, ""], *, total_steps: Count = 150, scale: NonNegative = 1.0) -> Float[Array, ""]:
    """A coefficient that falls slowly to 0.83 over the first half of a run and fast towards 0.04 over the second.

        e = step,   h = floor(total_steps / 2)

        scale * (1 - 0.2 * (1 - exp(-2 e / h)))             where e <= h
        scale * 0.8 * exp(-3 (e - h) / (total_steps - h))   else

    Args:
      step: updates of the batch made so far.
      total_steps: steps of the run.
      scale: the coefficient at step 0.

    Returns:
      The coefficient of this step.

    Raises:
      ValueError: for a run of fewer than two steps.

    Reference: EPO (2509.22576).
    Certainty: verified
    """
    if total_steps < 2:
        raise ValueError(f"total_steps is {total_steps}; two phases need at least 2 steps")
    half = total_steps // 2
    e = jnp.asarray(step).astype(jnp.float32)
    early = 1 - 0.2 * (1 - jnp.exp(-2 * e / half))
    late = 0.8 * jnp.exp(-3 * (e - half) / (total_steps - half))
    return scale * jnp.where(e <= half, early, late)


@ranged
def every_other(step: Int[Array, ""] | int, *, phase: Natural = 0, period: Count = 2) -> Float[Array, ""]:
    """A coefficient that is 1 in one step of every `period` and 0 in the others, for losses that alternate.

    Args:
      step: updates made so far.
      phase: index of that step within the period, from 0.
      period: steps of one cycle.

    Returns:
      1.0 or 0.0, a scalar.

    >>> [float(every_other(step, phase=1)) for step in range(4)]
    [0.0, 1.0, 0.0, 1.0]

    Certainty: verified
    """
    return (jnp.asarray(step) % period == phase).astype(jnp.float32)
