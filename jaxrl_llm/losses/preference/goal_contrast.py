"""Contrastive terms beside a reward model's loss: states of an answer are similar to its own final states."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.statistics import by_row


def goal_contrast(
    goal_values: Float[Array, "B T N"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    weight: Float[Array, "B"],
) -> Loss:
    """Goal-conditioned: states of a better answer are similar to its later states, not to those of the worse answer.

        P+ = mean of sigmoid(cos(h_s, h_g)) over states s and g of the better answer, s early and g late
        P- = the same with s of the better answer and g of the worse one, both uniform
        x  = -log P+ - log(1 - P-)

    averaged over pairs. The means are inside the logarithms, one for each pair. Positions are averaged over instead of
    sampled: early has the density of the smaller of two uniform numbers, late that of the larger, as in the paper's
    sampling.

    Args:
      goal_values: an embedding of each token, of a network `goal` with a head of N outputs.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      weight: of each row.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `same_goal` (P+) and `other_goal` (P-).

    Reference: Goal-conditioned representations for reward models (2407.13887).
    Certainty: verified, except that positions are averaged over and means are per pair
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
    pairs = pairs_of(preferred, weight, group)

    def alike(i: Array, j: Array, of_i: Array, of_j: Array) -> Array:
        return of_i @ jax.nn.sigmoid(state[i] @ state[j].T) @ of_j

    rows = jnp.arange(len(group))
    same = by_row(lambda i: alike(i, i, early[i], late[i]), rows, together=1)
    # Places of the worse answers in front: the n-th ones of all rows are compared together, while any row has one.
    worse = jnp.argsort(pairs.share <= 0, axis=1, stable=True)

    @jax.checkpoint
    def with_nth(total: Array, n: Array) -> tuple[Array, None]:
        other = worse[:, n]
        share = jnp.take_along_axis(pairs.share, other[:, None], axis=1)[:, 0]

        def compared() -> Array:
            against = by_row(lambda i, j: alike(i, j, flat[i], flat[j]), rows, other, together=1)
            there = share > 0
            loss = -jnp.log(jnp.where(there, same, 1.0)) - jnp.log1p(-jnp.where(there, against, 0.0))
            return jnp.stack([(share * loss).sum(), (share * against).sum()])

        return total + jax.lax.cond((share > 0).any(), compared, lambda: jnp.zeros(2)), None

    (loss, other), _ = jax.lax.scan(with_nth, jnp.zeros(2), rows)
    metrics = {"same_goal": ((pairs.share.sum(1) * same).sum(), pairs.count), "other_goal": (other, pairs.count)}
    return Loss(loss, pairs.count, metrics)


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
