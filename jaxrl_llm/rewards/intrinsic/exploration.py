"""Exploration bonuses for new states, within an episode and over the whole run."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, Positive, ranged

Scope = Literal["episodic", "global", "product"]


@ranged
def elliptical_bonus(
    features: Float[Array, "B S D"], turn_mask: Float[Array, "B S"], *, ridge: Positive = 0.1
) -> Float[Array, "B S"]:
    """Elliptical novelty of each turn's features relative to the earlier turns of the conversation.

        b_t = phi_t^T C_{t-1}^-1 phi_t,   C_t = C_{t-1} + phi_t phi_t^T,   C_0 = ridge * I

    Args:
      features: of the state at each turn.
      turn_mask: non-zero on existing turns.
      ridge: 1 / ridge is the bonus of the first turn with a unit feature.

    Returns:
      One bonus per turn; 0 where the mask is 0.

    Reference: E3B, global and episodic bonuses (2306.03236).
    Certainty: verified
    """
    chex.assert_rank([features, turn_mask], [3, 2])
    count, _, width = features.shape
    there = (turn_mask > 0)[..., None]
    phi = jnp.where(there, features.astype(jnp.float32), 0.0).swapaxes(0, 1)

    def turn(inverse, phi):
        u = jnp.einsum("bij,bj->bi", inverse, phi)
        bonus = jnp.einsum("bi,bi->b", phi, u)
        return inverse - u[:, :, None] * u[:, None, :] / (1 + bonus)[:, None, None], bonus

    start = jnp.broadcast_to(jnp.eye(width) / ridge, (count, width, width))
    return jax.lax.scan(turn, start, phi)[1].swapaxes(0, 1)


@ranged
def count_bonus(*, scope: Scope = "product", buckets: Count = 65536) -> Method:
    """Count-based bonuses for states with integer ids.

        episodic  1 / sqrt(N_e),  N_e the visits of the state in this conversation, the present one included
        global    1 / sqrt(N),    N the visits in the whole run
        product   both multiplied

    N counts earlier steps and the conversation itself, so rows of a batch do not depend on each other. Counts are kept
    in `buckets` cells by number modulo buckets.

    Args:
      scope: as above.
      buckets: cells of the memory.

    Returns:
      A method: (state_id [B S], turn_mask [B S], weight [B]) -> bonuses [B S], 0 where there is no turn.

    Raises:
      ValueError: for an unknown scope.

    Reference: E3B, global and episodic bonuses (2306.03236).
    Certainty: verified
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope is {scope!r}; it must be one of {', '.join(get_args(Scope))}")

    def init() -> Float[Array, "N"]:
        return jnp.zeros(buckets, jnp.float32)

    def update(
        memory: Float[Array, "N"],
        state_id: Int[Array, "B S"],
        turn_mask: Float[Array, "B S"],
        weight: Float[Array, "B"],
    ) -> tuple[Float[Array, "B S"], Float[Array, "N"]]:
        chex.assert_rank([state_id, turn_mask, weight], [2, 2, 1])
        there = (turn_mask > 0) & (weight > 0)[:, None]
        cell = state_id % buckets
        seen = (state_id[:, :, None] == state_id[:, None, :]) & there[:, None, :]
        before = jnp.tril(jnp.ones((state_id.shape[1],) * 2, bool))
        own = jnp.maximum((seen & before).sum(-1), 1)
        episodic, everywhere = 1 / jnp.sqrt(own), 1 / jnp.sqrt(memory[cell] + own)
        memory = memory.at[cell].add(there.astype(jnp.float32))
        bonus = {"episodic": episodic, "global": everywhere, "product": episodic * everywhere}[scope]
        return jnp.where(there, bonus, 0.0), memory

    return Method(init, update)


@ranged
def coverage_gains(
    covered: Float[Array, "B S U"], turn_mask: Float[Array, "B S"], *, element_weights: tuple[float, ...] | None = None
) -> Float[Array, "B S"]:
    """Marginal gain of each turn in a weighted coverage function.

        g_t = sum_u w_u max(0, c_tu - max_{s < t} c_su)

    The function is monotone and submodular: elements covered again add 0.

    Args:
      covered: 1 (or a degree in [0, 1]) where a turn covers an element: a fact, a test case, an answer.
      turn_mask: non-zero on existing turns.
      element_weights: of the elements; None weighs all 1.

    Returns:
      One gain per turn; their sum is the coverage of the conversation.

    Raises:
      ValueError: for another number of weights than elements.

    Reference: submodular reinforcement learning (2307.13372).
    Certainty: recalled
    """
    chex.assert_rank([covered, turn_mask], [3, 2])
    elements = covered.shape[2]
    weights = jnp.ones(elements) if element_weights is None else jnp.asarray(element_weights, jnp.float32)
    if weights.shape != (elements,):
        raise ValueError(
            f"element_weights has {weights.size} entries, but there are {elements} elements; give one for each"
        )
    held = jnp.where((turn_mask > 0)[..., None], covered.astype(jnp.float32), 0.0)
    sofar = jax.lax.cummax(held, axis=1)
    before = jnp.concatenate([jnp.zeros_like(sofar[:, :1]), sofar[:, :-1]], axis=1)
    return ((sofar - before) * weights).sum(-1)
