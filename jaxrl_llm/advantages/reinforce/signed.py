"""Advantages from correctness alone: train on right answers, on wrong ones, or on both with unequal weights."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.statistics import present

Side = Literal["positive", "negative"]


@ranged
def signed_correctness(
    correct: Float[Array, "B"], weight: Float[Array, "B"], *, positive: NonNegative = 0.1, negative: NonNegative = 1.0
) -> Float[Array, "B"]:
    """`positive` for a right answer, -`negative` for a wrong one, without baseline or scale.

        PSR           positive 1, negative 0    pass@1 rises, pass@k for large k falls
        NSR           positive 0, negative 1    entropy and pass@k for large k stay near those of the base model
        W-REINFORCE   positive 0.1, negative 1

    Where one of the two is 0, `nonzero_advantages` removes rows of advantage 0 from the averages.

    Args:
      correct: 1 for a right answer, 0 for a wrong one.
      weight: weight of each row; 0 is absent.
      positive: advantage of a right answer.
      negative: minus the advantage of a wrong answer.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for a negative number.

    Reference: The surprising effectiveness of negative reinforcement (2506.01347).
    Certainty: verified
    """
    chex.assert_rank([correct, weight], 1)
    return present(jnp.where(correct > 0, positive, -negative), weight)


def one_sided(
    advantages: Float[Array, "B ..."], rewards: Float[Array, "B"], *, side: Side = "negative"
) -> Float[Array, "B ..."]:
    """Advantages of the right or of the wrong rows only, computed over the whole group; both sides sum to the whole.

        negative  A 1[r < 1]
        positive  A 1[r > 0]

    Args:
      advantages: A, of each row or of each token.
      rewards: r, 0 or 1.
      side: as above.

    Returns:
      Advantages of the same shape, 0 on the other side.

    Raises:
      ValueError: for an unknown side.

    >>> one_sided(jnp.array([1.0, -0.5, -0.5]), jnp.array([1.0, 0.0, 0.0])).tolist()
    [0.0, -0.5, -0.5]

    Reference: model-task alignment (2508.21188).
    Certainty: verified
    """
    if side not in get_args(Side):
        raise ValueError(f"side is {side!r}; it must be one of {', '.join(get_args(Side))}")
    chex.assert_equal_shape_prefix([advantages, rewards], 1)
    counted = rewards < 1 if side == "negative" else rewards > 0
    return jnp.where(counted.reshape(-1, *[1] * (advantages.ndim - 1)), advantages, 0.0)
