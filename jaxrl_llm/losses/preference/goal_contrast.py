"""Hidden states of answers that lead to the same goal are alike: contrastive terms beside a reward model's loss."""

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
    """Goal-conditioned: states on the way of a better answer point to where it goes, not to where the worse one goes.

        P+ = mean over pairs of the mean of sigmoid(cos(h_s, h_g)),  s and g of the better answer, s before g
        P- = the same with s of the better answer and g of the worse one
        x = -log P+ - log(1 - P-)

    The means stand inside of the logarithms, one for each prompt. Positions are not drawn but averaged over: a source
    has the density of the smaller of two uniform numbers, a goal that of the larger, as in the paper's draws.

    Args:
      goal_values: an embedding of each token, of a network `goal` with a head of N outputs a token.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to; naming it keeps groups whole.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      weight: of each row.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `same_goal` (P+) and `other_goal` (P-).

    Reference: Goal-conditioned representations for reward models (2407.13887).
    Certainty: verified, but that positions are averaged over and means are of a prompt
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

    def against(worse: Array) -> Array:  # a row at a time: all pairs of tokens of all rows would not fit
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
    """How much each prefix points to a goal, cos(h_t, goal): the Q-value that samples are filtered or steered by.

    Args:
      goal_values: an embedding of each token.
      goal: such as the mean embedding of the last tokens of better answers.
      mask: non-zero on tokens that count.

    Reference: Goal-conditioned representations for reward models (2407.13887).
    Certainty: verified
    """
    state, goal = goal_values.astype(jnp.float32), goal.astype(jnp.float32)
    norm = jnp.linalg.norm(state, axis=-1) * jnp.linalg.norm(goal)
    return jnp.where(mask > 0, state @ goal / (norm + 1e-8), 0.0)
