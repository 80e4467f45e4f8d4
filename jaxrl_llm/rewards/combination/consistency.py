"""A reward for answers that are right for the reasons they give."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import Natural, ranged


@ranged
def consistent_accuracy(
    reward_components: Float[Array, "B K"],
    *,
    accuracy_column: Natural = 0,
    format_column: Natural = 1,
    consistency_column: Natural = 2,
    format_weight: float = 0.5,
    consistency_weight: float = 0.5,
) -> Float[Array, "B"]:
    """Accuracy, worth more where a judge finds reasoning and verdict to agree, plus the format.

        r = format_weight * format + accuracy * (1 + consistency_weight * consistency)

    Consistency multiplies accuracy: added, it could be earned by a wrong answer that is consistently wrong.

    Args:
      reward_components: one column a reward function.
      accuracy_column: number of the column that says whether the answer is right.
      format_column: number of the column that says whether the format is kept.
      consistency_column: number of the column in which a judge says whether reasoning and verdict agree.
      format_weight: value of the format.
      consistency_weight: value of consistency, in units of accuracy.

    Returns:
      One reward a row, float32.

    Raises:
      ValueError: for a column that does not exist.

    Reference: StableReinforce, R1-Reward (2505.02835).
    Certainty: verified
    """
    chex.assert_rank(reward_components, 2)
    columns = reward_components.shape[1]
    for name, column in (
        ("accuracy_column", accuracy_column),
        ("format_column", format_column),
        ("consistency_column", consistency_column),
    ):
        if not 0 <= column < columns:
            raise ValueError(
                f"{name} is {column}, but there are {columns} reward components, numbered from 0; list that reward "
                "function in the recipe and give its place"
            )
    components = reward_components.astype(jnp.float32)
    right = components[:, accuracy_column] * (1 + consistency_weight * components[:, consistency_column])
    return format_weight * components[:, format_column] + right
