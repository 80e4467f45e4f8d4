"""Prompts, or positions of a text, in the order of the entropy of their continuation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Count, Share, ranged
from jaxrl_llm.selection.pools import Records, items_by_turns, means_of, record_ids, visited


class Tiers(NamedTuple):
    """State of `by_entropy`; an item is a prompt, such as a position of a text.

    Attributes:
      entropy: entropy after each item at its first visit; NaN before.
      visits: steps in which each item was trained on.
      steps: steps trained on.
    """

    entropy: Float[Array, "I"]
    visits: Int[Array, "I"]
    steps: Int[Array, ""]


def tier_chances(
    progress: Float[Array, ""], first: tuple[float, ...], last: tuple[float, ...], hold: float, until: float
) -> Float[Array, "K"]:
    """Probabilities of the tiers: `first` up to the share `hold` of the run, `last` from `until` on, linear between.

    >>> tier_chances(jnp.float32(0.5), (0.6, 0.3, 0.1), (0.1, 0.3, 0.6), 0.3, 0.7).round(3).tolist()
    [0.3500000238418579, 0.30000001192092896, 0.3500000238418579]
    """
    share = jnp.clip((progress - hold) / max(until - hold, 1e-9), 0.0, 1.0)
    mixed = (1.0 - share) * jnp.asarray(first) + share * jnp.asarray(last)
    return mixed / mixed.sum()


def tiers_of(entropy: Float[Array, "I"], ids: np.ndarray, tiers: int) -> Int[Array, "I"]:
    """Tiers of equal size in ascending order of entropy; an unknown entropy counts as the median.

    Items of equal entropy are ordered by `ids`, the `record_ids`, so the tiers do not depend on the order of the data.

    >>> tiers_of(jnp.array([0.1, jnp.nan, 2.0]), np.array([7, 8, 9]), 3).tolist()
    [0, 1, 2]
    """
    known = ~jnp.isnan(entropy)
    middle = jnp.where(known.any(), jnp.nanmedian(entropy), 0.0)
    rank = jnp.argsort(jnp.lexsort((jnp.asarray(ids), jnp.where(known, entropy, middle))))
    return (rank * tiers // len(entropy)).astype(jnp.int32)


@ranged
def by_entropy(
    *,
    records: Records,
    total_steps: Count,
    first: tuple[Share, ...] = (0.6, 0.3, 0.1),
    last: tuple[Share, ...] = (0.1, 0.3, 0.6),
    hold: Share = 0.3,
    until: Share = 0.7,
) -> Selection:
    """Items of low entropy first, of high entropy later.

        P(tier) = first up to `hold` of the run, last from `until` on, linear between

    Tiers have equal sizes and are ordered by the entropy of the continuation. A step draws a tier for each prompt;
    within a tier, items with the fewest visits come first. The entropy is `position_entropy`, filled by an entry of
    credit, at the first visit; the paper measures all items with the base policy. The bounds of the tiers and both
    tables of probabilities are not from the paper.

    Args:
      records: records of the data, one per item; filled from the run.
      total_steps: steps of the run; filled from it.
      first, last: probabilities of the tiers at the start and at the end, the lowest entropy first.
      hold, until: shares of the run between which the probabilities change.

    Returns:
      A `Selection`. It reports the probability of the highest tier.

    Raises:
      ValueError: for tables of different lengths or of zeros, fewer prompts than tiers, or `until` below `hold`.

    Reference: RMT (2509.24375).
    Certainty: verified
    """
    count, ids = len(first), record_ids(records)
    if len(last) != count or not 0 < count <= len(ids) or sum(first) <= 0 or sum(last) <= 0:
        raise ValueError(
            f"first has {count} probabilities and last {len(last)}, for {len(ids)} prompts; they must have equal "
            "lengths, at most the number of prompts, and positive sums"
        )
    if until < hold:
        raise ValueError(f"until is {until} and hold is {hold}; until must be at least hold")

    def chances(memory: Tiers) -> Float[Array, "K"]:
        return tier_chances(memory.steps / total_steps, first, last, hold, until)

    def init() -> Tiers:
        return Tiers(jnp.full(len(ids), jnp.nan, jnp.float32), jnp.zeros(len(ids), jnp.int32), jnp.int32(0))

    def choose(memory: Tiers, key: Array, number: int) -> Int[Array, "N"]:
        of_tier, of_order = jax.random.split(key)
        drawn = jax.random.categorical(of_tier, jnp.log(chances(memory)), shape=(number,))
        return items_by_turns(drawn, tiers_of(memory.entropy, ids, count), memory.visits, of_order, ids, count)

    def update(
        memory: Tiers, item: Int[Array, "B"], position_entropy: Float[Array, "B"], weight: Float[Array, "B"]
    ) -> Tiers:
        there = (weight > 0) & ~jnp.isnan(position_entropy)
        mean, met = means_of(position_entropy, item, there, len(ids))
        entropy = jnp.where(jnp.isnan(memory.entropy) & met, mean, memory.entropy)
        return Tiers(entropy, visited(memory.visits, item, weight), memory.steps + 1)

    return Selection(init, choose, update, lambda memory: {"hardest_tier": chances(memory)[-1]})
