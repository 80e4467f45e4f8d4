"""An optimiser with paired updates: a first update for the point at which the gradient of the second is taken."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def climb_then_descend(
    learning_rate: optax.ScalarOrSchedule, *, ascent: float = 1e-3, descent: Literal["adamw", "sgd"] = "adamw"
) -> optax.GradientTransformation:
    """An optimiser with paired updates: an ascent, and a descent from the point before it by the gradient after it.

        theta' = theta + ascent * g_1(theta),   theta <- theta - learning_rate * g_2(theta')

    with g_2 through AdamW where that is chosen. MetaRM: g_1 is of `score_spread` on samples, g_2 of pairs; coefficients
    take turns with the updates (`every_other`). Between the two updates the parameters are theta'.

    Args:
      learning_rate: of the descent, in pairs of updates.
      ascent: rate of the climb.
      descent: what turns g_2 into a step.

    Returns:
      An optax optimiser: `networks.reward.optimizer: {climb_then_descend: {ascent: 1.0e-3}}`.

    Raises:
      ValueError: for an ascent that is not positive, or another descent.

    Reference: MetaRM in MOSS-RLHF (2401.06080), first-order; sharpness-aware minimisation (2010.01412) has g_1 = g_2.
    Certainty: recalled
    """
    if not ascent > 0:
        raise ValueError(f"ascent is {ascent}; it must be above 0")
    if descent not in ("adamw", "sgd"):
        raise ValueError(f"descent is {descent!r}; it must be 'adamw' or 'sgd'")
    inner = optax.adamw(learning_rate, weight_decay=0.0) if descent == "adamw" else optax.sgd(learning_rate)

    def init(params: PyTree) -> dict[str, Any]:
        return {"climbs": jnp.bool_(True), "before": jax.tree.map(jnp.copy, params), "inner": inner.init(params)}

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        steps, after = inner.update(updates, state["inner"], state["before"])
        climbs = state["climbs"]
        chosen = lambda up, down: jax.tree.map(lambda a, b: jnp.where(climbs, a, b), up, down)  # noqa: E731
        back = jax.tree.map(lambda step, old, now: old + step - now, steps, state["before"], params)
        made = chosen(jax.tree.map(lambda g: ascent * g, updates), back)
        return made, {
            "climbs": ~climbs,
            "before": chosen(params, state["before"]),
            "inner": chosen(state["inner"], after),
        }

    return optax.GradientTransformation(init, update)
