"""Rewards from comparisons: how often an answer wins against the other answers to its prompt."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, ranged


def win_rate(
    preferences: Float[Array, "B S"], sample: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Mean probability of being preferred to another answer of the group: the reward of SPO.

        r_i = mean_{j != i} Q_ij,   Q_ij = P(answer i beats answer j)

    A cycle of preferences gives equal rewards, which one scalar score per answer cannot represent.

    Args:
      preferences: Q, a row's probability of beating the sample numbered s of its own group; its own column and columns
        of samples that the group lacks are ignored.
      sample: number of the sample within its group, in [0, S).
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One reward per row in [0, 1]; 1/2 without an opponent, 0 in absent rows.

    Reference: SPO, a minimaximalist approach (2401.04056).
    Certainty: recalled
    """
    chex.assert_rank([preferences, sample, group, weight], [2, 1, 1, 1])
    return _mean_win(preferences.astype(jnp.float32)[:, sample], group, weight)


@ranged
def score_win_rate(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, temperature: NonNegative = 0.0
) -> Float[Array, "B"]:
    """`win_rate` where answers are compared by a score: only the order of a group's scores matters, not their size.

        Q_ij = 1 where r_i > r_j, 1/2 where they are equal, else 0
        Q_ij = sigmoid((r_i - r_j) / temperature)    with a temperature

    Args:
      rewards: score of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      temperature: in units of score; 0 compares by order.

    Returns:
      One reward per row in [0, 1]; 1/2 without an opponent, 0 in absent rows.

    Raises:
      ValueError: for a negative temperature.

    Reference: SPO, a minimaximalist approach (2401.04056).
    Certainty: recalled
    """
    chex.assert_rank([rewards, group, weight], 1)
    scores = jnp.where(weight > 0, rewards.astype(jnp.float32), 0.0)
    gap = scores[:, None] - scores[None, :]
    wins = (jnp.sign(gap) + 1) / 2 if temperature == 0 else jax.nn.sigmoid(gap / temperature)
    return _mean_win(wins, group, weight)


def _mean_win(wins: Float[Array, "B B"], group: Array, weight: Array) -> Float[Array, "B"]:
    weights = jnp.where(weight > 0, weight.astype(jnp.float32), 0.0)
    rivals = (group[:, None] == group[None, :]) & ~jnp.eye(len(group), dtype=bool)
    counts = jnp.where(rivals, weights[None, :], 0.0)
    total = counts.sum(-1)
    mean = jnp.where(counts > 0, counts * wins, 0.0).sum(-1) / jnp.where(total > 0, total, 1.0)
    return jnp.where(weights > 0, jnp.where(total > 0, mean, 0.5), 0.0)
