"""A curriculum that a bandit makes of what the policy learns from."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Positive, PositiveShare, ranged
from jaxrl_llm.selection.pools import Records, items_by_turns, means_of, pool, visited


class Arms(NamedTuple):
    """What a bandit remembers.

    Attributes:
      value: of each arm: how much was learned from it lately.
      visits: steps in which each item was learned from.
    """

    value: Float[Array, "K"]
    visits: Int[Array, "I"]


@ranged
def bandit(
    *,
    records: Records,
    arms: str | tuple[str, ...] = "level",
    temperature: Positive = 1.0,
    rate: PositiveShare = 0.5,
    decay_unsampled: bool = False,
) -> Selection:
    """Prompts of the kinds that the policy learns most from.

        P_k = exp(Q_k / temperature) / sum_j exp(Q_j / temperature)
        Q_k <- (1 - rate) Q_k + rate mean(s),    s = sum_t m_t abs(A_t) / sum_t m_t

    with the mean over the rows of arm k in a step, m their mask and A their advantages. For rewards of 0 and 1 and
    advantages divided by their deviation, the mean of s is 2 sqrt(p (1 - p)) where p of the samples are right: what is
    half solved is worth most, and arms that are solved or hopeless are left alike.

    Each prompt of a step draws an arm. Within an arm the items that were learned from least often come first, in random
    order. The choices of the step under way are not counted yet, so two steps that follow one another may share items.

    Args:
      records: of the data, one an item; filled from the run.
      arms: column of the records whose values are the arms, such as level or domain; or several, for combinations.
      temperature: of the softmax over values: 1, 0.4 and 0.2 in the paper, the lower the more alike the values are.
      rate: how fast values follow.
      decay_unsampled: values of arms that a step did not draw move towards 0, as in the released code.

    Returns:
      A `Selection`. All arms are worth 0 at first, and so equally likely.

    Raises:
      ValueError: for a column that records do not have, a single arm, or numbers out of range.

    Reference: SEC, self-evolving curriculum (2505.14970).
    Certainty: verified
    """
    sorted_items = pool(records, arms, name="arms")
    of_item, kinds = sorted_items.of_item, sorted_items.kinds

    def init() -> Arms:
        return Arms(jnp.zeros(len(kinds), jnp.float32), jnp.zeros(len(of_item), jnp.int32))

    def choose(memory: Arms, key: Array, count: int) -> Int[Array, "N"]:
        of_arm, of_order = jax.random.split(key)
        drawn = jax.random.categorical(of_arm, memory.value / temperature, shape=(count,))
        return items_by_turns(drawn, of_item, memory.visits, of_order, sorted_items.ids, len(kinds))

    def update(
        memory: Arms,
        item: Int[Array, "B"],
        advantages: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
    ) -> Arms:
        counted = jnp.where(mask > 0, mask.astype(jnp.float32), 0.0)
        tokens = counted.sum(axis=1)
        signal = (counted * jnp.abs(advantages)).sum(axis=1) / jnp.where(tokens > 0, tokens, 1.0)
        there = (weight > 0) & (tokens > 0)
        value = moved_values(
            memory.value, jnp.asarray(of_item)[item], signal, there, rate=rate, decay_unsampled=decay_unsampled
        )
        return Arms(value, visited(memory.visits, item, weight))

    def report(memory: Arms) -> dict[str, Array]:
        chance = jax.nn.softmax(memory.value / temperature)
        labels = sorted_items.labels
        told = {f"value/{label}": memory.value[k] for k, label in enumerate(labels)}
        return told | {f"chance/{label}": chance[k] for k, label in enumerate(labels)}

    return Selection(init, choose, update, report)


@ranged
def moved_values(
    value: Float[Array, "K"],
    arm: Int[Array, "B"],
    signal: Float[Array, "B"],
    there: Array,
    *,
    rate: PositiveShare,
    decay_unsampled: bool = False,
) -> Float[Array, "K"]:
    """Values of arms after the rows of a step.

    Args:
      value: before it.
      arm: number of each row's arm.
      signal: what was learned from each row.
      there: rows that count.
      rate: how fast values follow.
      decay_unsampled: arms without rows move towards 0 instead of staying.
    """
    chex.assert_rank([value, arm, signal, there], 1)
    chex.assert_equal_shape([arm, signal, there])
    mean, met = means_of(signal, arm, there, len(value))
    moved = (1.0 - rate) * value + rate * mean
    return moved if decay_unsampled else jnp.where(met, moved, value)
