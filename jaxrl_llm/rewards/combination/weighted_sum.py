"""The weighted sum of reward components."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import ranged


@ranged
def weighted_sum(reward_components: Float[Array, "B K"], *, weights: tuple[float, ...]) -> Float[Array, "B"]:
    """Weighted sum of the components.

        r_b = sum_k weights_k * components_bk

    A component of weight 0 is only logged; its values have no effect. A NaN component does not apply to the row and is
    left out of its sum; a row without any applicable weighted component gets NaN.

    Args:
      reward_components: one column per reward function.
      weights: one weight per column.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for another number of weights than of columns.
    """
    chex.assert_rank(reward_components, 2)
    if len(weights) != reward_components.shape[1]:
        raise ValueError(
            f"weights is {tuple(weights)}, {len(weights)} numbers, but there are {reward_components.shape[1]} reward "
            "components; give one weight for each reward function"
        )
    scale, components = jnp.asarray(weights, jnp.float32), reward_components.astype(jnp.float32)
    lacks = jnp.isnan(components)
    total = jnp.where((scale == 0) | lacks, 0.0, components * scale).sum(axis=1)
    counts = scale != 0 if any(weights) else jnp.ones(len(weights), bool)
    return jnp.where((lacks | ~counts).all(axis=1), jnp.nan, total)
