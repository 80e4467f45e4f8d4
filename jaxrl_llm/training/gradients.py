"""Gradients of the policy before the update: of single rewards, and of losses on held-out rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxrl_llm.advantages import group_normalized
from jaxrl_llm.experience import Experience, TrainState
from jaxrl_llm.losses import policy_gradient
from jaxrl_llm.schedules import gradient_alignment
from jaxrl_llm.terms import LossTerm
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.learn import Objective, gradient, parts_of, specs_of
from jaxrl_llm.training.networks import POLICY
from jaxrl_llm.training.segments import Work


def reward_influence(c: Composition, state: TrainState, work: Work) -> Work:
    """The influence of each reward function on all of them: the inner product of its policy gradient with their sum.

        s_k = <g_k, sum_j g_j>

    g_k is the gradient of `losses.policy_gradient` with the advantages of reward k alone, normalised within groups; NaN
    does not apply and has advantage 0. The gradients are accumulated over microbatches. Two of them are in memory.
    """
    rows: Experience = work["rows"]
    objective = Objective(c, (LossTerm(policy_gradient, name="policy_gradient"),))
    trained, specs = {POLICY: parts_of(c, state)[POLICY]}, specs_of(c)

    def slope(advantages: Float[Array, "B"]) -> PyTree:
        told = rows.filled(advantages=jnp.where(rows.mask > 0, advantages[:, None], 0.0))
        return gradient(objective, specs, trained, state, told, [jnp.float32(1.0)])[0][POLICY]

    def alone(reward: Float[Array, "B"]) -> Float[Array, "B"]:
        known = jnp.where(jnp.isnan(reward), 0.0, rows.weight)
        return group_normalized(jnp.where(known > 0, reward, 0.0), rows["group"], known)

    advantages = jax.vmap(alone, in_axes=1)(rows["reward_components"])
    together = slope(advantages.sum(0))  # a gradient is linear in the advantages

    def influence(advantages: Float[Array, "B"]) -> Float[Array, ""]:
        products = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision="highest"), slope(advantages), together)
        return jnp.stack(jax.tree.leaves(products)).astype(jnp.float32).sum()

    return {"reward_influence": jax.lax.map(influence, advantages)}


def measured_alignment(c: Composition, state: TrainState, batch: Experience) -> Array:
    """`alignment` every `alignment_every_steps` steps, 0 at the others."""
    due = state.step % c.update.alignment_every_steps == 0
    return jax.lax.cond(due, partial(alignment, c), lambda state, batch: jnp.float32(0.0), state, batch)


def alignment(c: Composition, state: TrainState, experience: Experience) -> Array:
    """`schedules.gradient_alignment` of this batch: whether the losses on written rows would lower a held-out loss
    faster.

    The held-out loss consists of the losses on written rows, on the rows marked by `validation`, whose weight is
    otherwise 0.
    """
    supervised = tuple(t for t in c.losses if t.on_written)
    others = tuple(t for t in c.losses if not t.on_written)
    trained, specs = parts_of(c, state), specs_of(c)

    def slope(terms: tuple[LossTerm, ...], rows: Experience) -> PyTree:
        factors = [jnp.float32(1.0 if t.coefficient_changes else t.coefficient) for t in terms]
        return gradient(Objective(c, terms), specs, trained, state, rows, factors)[0][POLICY]

    held_out = replace(experience, weight=experience["validation"])
    return gradient_alignment(
        slope(supervised, held_out),
        slope(supervised, experience),
        slope(others, experience),
        learning_rate=c.update.alignment_learning_rate,
    )
