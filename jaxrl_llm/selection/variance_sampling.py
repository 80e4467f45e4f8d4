"""Selection of prompts by the variance of their rewards and the diversity of their samples."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Count, NonNegative, Share, ShareBelowOne, ranged
from jaxrl_llm.selection.pools import Records, items_by_turns, items_by_weight, means_of, record_ids, visited
from jaxrl_llm.statistics import subgroup_ids


def distinct_pairs(
    tokens: Int[Array, "B T"], mask: Float[Array, "B T"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Distinct-2: distinct pairs of neighbouring tokens divided by all pairs, over the samples of a group.

    Args:
      tokens: of the completions.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One number per row, equal within a group; 0 in groups without pairs.

    Reference: VAS, MMR1 (2509.21268).
    Certainty: verified
    """
    chex.assert_rank([tokens, mask, group, weight], [2, 2, 1, 1])
    rows, width = tokens.shape
    there = (mask[:, 1:] > 0) & (mask[:, :-1] > 0) & (weight > 0)[:, None]
    flat = jnp.repeat(jnp.where(weight > 0, group, rows), width - 1)
    first = subgroup_ids(jnp.where(there.ravel(), flat, rows), tokens[:, :-1].ravel())
    pair = subgroup_ids(first, tokens[:, 1:].ravel())
    present = there.ravel().astype(jnp.float32)
    of_pair = jax.ops.segment_sum(present, pair, num_segments=len(pair))[pair]
    share = jnp.where(present > 0, 1.0 / jnp.maximum(of_pair, 1.0), 0.0)
    count = lambda values: jax.ops.segment_sum(values, flat, num_segments=rows + 1)[group]  # noqa: E731
    return jnp.where(weight > 0, count(share) / jnp.maximum(count(present), 1.0), 0.0)


class Values(NamedTuple):
    """State of `variance_aware`.

    Attributes:
      latest: value of each item at its last visits; NaN if unknown.
      used: values that prompts are drawn by.
      visits: steps in which each item was trained on.
      steps: steps trained on.
    """

    latest: Float[Array, "I"]
    used: Float[Array, "I"]
    visits: Int[Array, "I"]
    steps: Int[Array, ""]


@ranged
def variance_aware(
    *,
    records: Records,
    variance: NonNegative = 0.8,
    diversity: NonNegative = 0.2,
    weighted_share: Share = 0.5,
    refresh_every_steps: Count = 28,
    momentum: ShareBelowOne = 0.0,
) -> Selection:
    """Half of the prompts by reward variance and sample diversity, half in rotation: VAS.

        value_i = variance p_i (1 - p_i) + diversity distinct_pairs_i,    P_i = value_i / sum_j value_j

    floor(weighted_share N) prompts of a step are drawn with replacement by P; the others are taken in rotation. The two
    are interleaved. The paper samples every prompt again at each refresh; here the value is that of the last visit, and
    prompts without a value count as the mean of the others. If all values are 0, the draw is uniform.

    Args:
      records: records of the data, one per item; filled from the run.
      variance: factor of p (1 - p), with p the share of right samples.
      diversity: factor of the share of distinct token pairs.
      weighted_share: share of the prompts drawn by value.
      refresh_every_steps: steps between two updates of P.
      momentum: weight of the old value at a visit.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for a number out of range.

    Reference: VAS, MMR1 (2509.21268).
    Certainty: verified
    """
    ids = record_ids(records)

    def init() -> Values:
        none = jnp.full(len(ids), jnp.nan, jnp.float32)
        return Values(none, none, jnp.zeros(len(ids), jnp.int32), jnp.int32(0))

    def weights(values: Float[Array, "I"]) -> Float[Array, "I"]:
        known = ~jnp.isnan(values)
        mean = jnp.where(known, values, 0.0).sum() / jnp.maximum(known.sum(), 1)
        return jnp.where(known, values, mean)

    def choose(memory: Values, key: Array, count: int) -> Int[Array, "N"]:
        of_weighted, of_turns = jax.random.split(key)
        ends = np.floor(np.arange(count + 1) * weighted_share + 1e-9)
        weighted, by_turns = np.diff(ends) > 0, np.diff(ends) == 0
        drawn = items_by_weight(weights(memory.used), of_weighted, count, ids)
        turns = items_by_turns(
            jnp.zeros(count, jnp.int32), np.zeros(len(ids), np.int32), memory.visits, of_turns, ids, 1
        )
        place = np.cumsum(by_turns) - 1
        return jnp.where(jnp.asarray(weighted), drawn, turns[np.maximum(place, 0)])

    def update(
        memory: Values,
        item: Int[Array, "B"],
        correct: Float[Array, "B"],
        tokens: Int[Array, "B T"],
        mask: Float[Array, "B T"],
        group: Int[Array, "B"],
        weight: Float[Array, "B"],
    ) -> Values:
        success, met = means_of(correct, item, weight, len(ids))
        spread, _ = means_of(distinct_pairs(tokens, mask, group, weight), item, weight, len(ids))
        value = variance * success * (1.0 - success) + diversity * spread
        old = jnp.where(jnp.isnan(memory.latest), value, memory.latest)
        latest = jnp.where(met, momentum * old + (1.0 - momentum) * value, memory.latest)
        steps = memory.steps + 1
        used = jnp.where(steps % refresh_every_steps == 0, latest, memory.used)
        return Values(latest, used, visited(memory.visits, item, weight), steps)

    def report(memory: Values) -> dict[str, Array]:
        chance = weights(memory.used)
        known = ~jnp.isnan(memory.latest)
        largest = chance.max() / jnp.where(chance.sum() > 0, chance.sum(), 1.0)
        return {"known_share": known.mean(), "largest_chance": largest}

    return Selection(init, choose, update, report)
