"""Advantages that are the sign of the answer: learn from right answers only, from wrong ones only, or unequally."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.statistics import present


@ranged
def signed_correctness(
    correct: Float[Array, "B"], weight: Float[Array, "B"], *, positive: NonNegative = 0.1, negative: NonNegative = 1.0
) -> Float[Array, "B"]:
    """`positive` for a right answer, -`negative` for a wrong one, without baseline or scale.

        PSR           positive 1, negative 0    pass@1 rises, pass@k for large k falls
        NSR           positive 0, negative 1    entropy and pass@k for large k stay near those of the base model
        W-REINFORCE   positive 0.1, negative 1

    Where one of the two is 0, `nonzero_advantages` takes the silent rows out of the averages.

    Args:
      correct: 1 for a right answer, 0 for a wrong one.
      weight: weight of each row; 0 is absent.
      positive: advantage of a right answer.
      negative: minus the advantage of a wrong answer.

    Returns:
      One advantage a row, 0 in absent rows.

    Raises:
      ValueError: for a negative number.

    Reference: The surprising effectiveness of negative reinforcement (2506.01347).
    Certainty: verified
    """
    chex.assert_rank([correct, weight], 1)
    return present(jnp.where(correct > 0, positive, -negative), weight)
