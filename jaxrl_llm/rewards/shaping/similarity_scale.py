"""Rescaling of compressed similarity scores: around a moving threshold, or within the group."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, Positive, Share, ranged
from jaxrl_llm.statistics import group_max, group_min


@ranged
def stretched_scores(
    quality: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, least_spread: Positive = 1e-6
) -> Float[Array, "B"]:
    """Scores stretched over the group, more so for smaller spreads.

        spread = max - min,   c = clip(1 - spread, 0, 1)
        s' = (1 - c) * s + c * (s - min) / spread

    Args:
      quality: s in [0, 1], semantic similarity; NaN does not apply.
      group: id of the group each row belongs to.
      weight: 0 for absent rows.
      least_spread: groups with a smaller spread are unchanged.

    Returns:
      One score per row, float32; NaN where `quality` is NaN.

    Reference: adaptive semantic reward, ARMed (2508.12957).
    Certainty: reconstructed
    """
    chex.assert_rank([quality, group, weight], 1)
    s = quality.astype(jnp.float32)
    there = jnp.where(jnp.isnan(s), 0.0, weight.astype(jnp.float32))
    low, spread = group_min(s, group, there), group_max(s, group, there) - group_min(s, group, there)
    c = jnp.clip(1 - spread, 0.0, 1.0)
    wide = spread >= least_spread
    return jnp.where(wide, (1 - c) * s + c * (s - low) / jnp.where(wide, spread, 1.0), s)


@ranged
def sharpened_scores(*, quantile: Share = 0.5, slope: Positive = 20.0, memory: Count = 4096) -> Method:
    """Scores on an S-shaped curve around a quantile of those of earlier steps.

        s' = sigmoid(slope * (s - threshold)),   threshold the quantile of the scores in memory

    The memory holds raw scores of earlier steps. In the first step the threshold is the quantile of the batch. Slope,
    quantile and memory are our choice.

    Args:
      quantile: level of the threshold, linearly interpolated.
      slope: 4 times the slope of the curve at the threshold.
      memory: number of scores in memory.

    Returns:
      A method that names `quality` in [0, 1] and `weight`: one score per row, float32; NaN where `quality` is NaN.

    Reference: adaptive semantic reward, ARMed (2508.12957).
    Certainty: reconstructed
    """

    def init() -> Float[Array, "N"]:
        return jnp.full(memory, jnp.nan, jnp.float32)

    def update(
        past: Float[Array, "N"], quality: Float[Array, "B"], weight: Float[Array, "B"]
    ) -> tuple[Float[Array, "B"], Float[Array, "N"]]:
        s = quality.astype(jnp.float32)
        seen = jnp.where(weight > 0, s, jnp.nan)
        empty = jnp.isnan(past).all()
        threshold = jnp.where(empty, jnp.nanquantile(seen, quantile), jnp.nanquantile(past, quantile))
        # The newest scores replace the oldest; absent scores are not stored.
        both = jnp.concatenate([past, seen])
        kept = both[jnp.argsort(~jnp.isnan(both), stable=True)][-memory:]
        return jax.nn.sigmoid(slope * (s - threshold)), kept

    return Method(init, update)
