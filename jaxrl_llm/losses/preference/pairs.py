"""Pairs of a better and a worse answer to one prompt, which the preference losses share."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.losses.siblings import compact_ids, sibling_sum


class Pairs(NamedTuple):
    """All pairs of a batch as a matrix: row i is the better answer, row j the worse one.

    Attributes:
      share: weight of each pair, 0 for other entries; the weights of a prompt sum to the mean weight of its pairs'
        rows.
    """

    share: Float[Array, "B B"]

    def gap(self, scores: Float[Array, "B"]) -> Float[Array, "B B"]:
        """Score of the better answer minus that of the worse one, 0 (with zero gradient) outside pairs."""
        return jnp.where(self.share > 0, scores[:, None] - scores[None, :], 0.0)

    def of_both(self, scores: Float[Array, "B B"]) -> Float[Array, "B B"]:
        """The same for scores that depend on both rows: S_ij minus S_ji."""
        return jnp.where(self.share > 0, scores - scores.T, 0.0)

    def total(self, values: Float[Array, "B B"]) -> Float[Array, ""]:
        """Sum over the pairs, each with its weight."""
        return jnp.where(self.share > 0, self.share * values, 0.0).sum()

    @property
    def count(self) -> Float[Array, ""]:
        """Weight of all pairs together."""
        return self.share.sum()


def pairs_of(preferred: Float[Array, "B"], weights: Float[Array, "B"], group: Int[Array, "B"]) -> Pairs:
    """The pairs of a batch; a prompt with several better or worse answers contributes the mean over its pairs.

    Args:
      preferred: 1 for a better answer, 0 for a worse one; any other number belongs to no pair.
      weights: of each row; pairs with a row of weight 0 are absent.
      group: id of the group each row belongs to.
    """
    ids, weights = compact_ids(group), weights.astype(jnp.float32)
    better, worse = ((weights > 0) & (preferred == kind) for kind in (1, 0))
    there = (ids[:, None] == ids[None, :]) & better[:, None] & worse[None, :]
    pairs = sibling_sum(there.sum(-1).astype(jnp.float32), ids)
    both = (weights[:, None] + weights[None, :]) / 2
    return Pairs(jnp.where(there, both / jnp.where(pairs > 0, pairs, 1.0)[:, None], 0.0))
