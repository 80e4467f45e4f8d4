"""Contrastive terms beside a reward model's loss: states of an answer are similar to its own final states."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.preference.pairs import pairs_of


def goal_contrast(
    goal_values: Float[Array, "B T N"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    weight: Float[Array, "B"],
) -> Loss:
    """Goal-conditioned: states of a better answer are similar to its later states, not to those of the worse answer.

        P+ = mean over pairs of the mean of sigmoid(cos(h_s, h_g)),  s and g of the better answer, s early and g late P-
        = the same with s of the better answer and g of the worse one, both uniform x = -log P+ - log(1 - P-)

    The means are inside the logarithms, one for each prompt. Positions are averaged over instead of sampled: early has
    the density of the smaller of two uniform numbers, late that of the larger, as in the paper's sampling.

    Args:
      goal_values: an embedding of each token, of a network `goal` with a head of N outputs.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      weight: of each row.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `same_goal` (P+) and `other_goal` (P-).

    Reference: Goal-conditioned representations for reward models (2407.13887).
    Certainty: verified, except that positions are averaged over and means are per prompt
    """
    chex.assert_rank([goal_values, mask, group, preferred, weight], [3, 2, 1, 1, 1])
    there = mask > 0
    state = jnp.where(there[..., None], goal_values.astype(jnp.float32), 0.0)
    state = state / jnp.sqrt(jnp.maximum(jnp.square(state).sum(-1, keepdims=True), 1e-12))
    place = jnp.cumsum(there, axis=1).astype(jnp.float32)
    length = jnp.maximum(place[:, -1:], 1.0)
    early = jnp.where(there, (2 * (length - place) + 1) / length**2, 0.0)
    late = jnp.where(there, (2 * place - 1) / length**2, 0.0)
    flat = jnp.where(there, 1 / length, 0.0)
    same = jnp.einsum("it,is,its->i", early, late, jax.nn.sigmoid(jnp.einsum("itn,isn->its", state, state)))

    def against(worse: Array) -> Array:  # one row at a time: all pairs of tokens of all rows would not fit in memory
        alike = jax.nn.sigmoid(jnp.einsum("itn,sn->its", state, state[worse]))
        return jnp.einsum("it,s,its->i", flat, flat[worse], alike)

    other = jax.lax.map(against, jnp.arange(len(group))).T
    pairs = pairs_of(preferred, weight, group)
    loss = -jnp.log(jnp.where(pairs.share > 0, same[:, None], 1.0)) - jnp.log1p(-jnp.where(pairs.share > 0, other, 0.0))
    metrics = {
        "same_goal": (pairs.total(jnp.broadcast_to(same[:, None], other.shape)), pairs.count),
        "other_goal": (pairs.total(other), pairs.count),
    }
    return Loss(pairs.total(loss), pairs.count, metrics)


def goal_quality(
    goal_values: Float[Array, "B T N"], goal: Float[Array, "N"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Similarity of each prefix to a goal, cos(h_t, goal): a Q-value for filtering or steering samples.

    Args:
      goal_values: an embedding of each token.
      goal: such as the mean embedding of the last tokens of better answers.
      mask: non-zero on tokens that count.

    Returns:
      One number per token in [-1, 1], 0 outside the mask.

    Reference: Goal-conditioned representations for reward models (2407.13887).
    Certainty: verified
    """
    state, goal = goal_values.astype(jnp.float32), goal.astype(jnp.float32)
    norm = jnp.linalg.norm(state, axis=-1) * jnp.linalg.norm(goal)
    return jnp.where(mask > 0, state @ goal / (norm + 1e-8), 0.0)
