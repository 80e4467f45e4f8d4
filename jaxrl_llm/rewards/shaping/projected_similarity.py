"""Similarity of a completion to a goal along the direction from a baseline to the goal."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import Share, ranged


@ranged
def projected_similarity(
    embedding: Float[Array, "B D"],
    goal_embedding: Float[Array, "B D"],
    baseline_embedding: Float[Array, "B D"],
    *,
    alpha: Share = 0.5,
) -> Float[Array, "B"]:
    """Similarity of a completion to a goal, with less weight on components common to goal and baseline.

        d = g - b,   P = alpha d d^T / |d|^2 + (1 - alpha) I,   r = 1 - |P (x - g)|^2 / 2

    of the unit vectors x, g, b. alpha 0 is the cosine with the goal, 1 keeps only the direction from baseline to goal.

    Args:
      embedding: of each completion.
      goal_embedding: of the goal, such as the reference answer or a description.
      baseline_embedding: of a neutral state, such as the prompt.
      alpha: as above; choose it by agreement with a few judged completions.

    Returns:
      One reward per row; NaN (does not apply) where goal and baseline are equal.

    Raises:
      ValueError: for an alpha outside [0, 1].

    Reference: VLM-RM (2310.12921).
    Certainty: verified
    """
    chex.assert_rank([embedding, goal_embedding, baseline_embedding], 2)
    chex.assert_equal_shape([embedding, goal_embedding, baseline_embedding])

    def unit(vectors: Array) -> Array:
        vectors = vectors.astype(jnp.float32)
        norm = jnp.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / jnp.where(norm > 0, norm, 1.0)

    x, g, b = (unit(vectors) for vectors in (embedding, goal_embedding, baseline_embedding))
    d = g - b
    size = jnp.square(d).sum(1, keepdims=True)
    apart = size > 1e-12
    along = ((x - g) * d).sum(1, keepdims=True) * d / jnp.where(apart, size, 1.0)
    off = alpha * along + (1 - alpha) * (x - g)
    return jnp.where(apart[:, 0], 1 - jnp.square(off).sum(1) / 2, jnp.nan)
