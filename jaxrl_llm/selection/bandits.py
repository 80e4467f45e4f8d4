"""A curriculum by a multi-armed bandit over categories of prompts."""

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
      value: running mean of the learning signal of each arm.
      visits: steps in which each item was trained on.
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
    """Prompts of the categories with the largest absolute advantages.

        P_k = exp(Q_k / temperature) / sum_j exp(Q_j / temperature)
        Q_k <- (1 - rate) Q_k + rate mean(s),    s = sum_t m_t abs(A_t) / sum_t m_t

    with the mean over the rows of arm k in a step, m their mask and A their advantages. For rewards of 0 and 1 and
    advantages divided by their deviation, the mean of s is 2 sqrt(p (1 - p)) with p the share of right samples: it is
    largest at p = 1/2, and 0 for arms of which all or no samples are right.

    Each prompt of a step draws an arm. Within an arm the items with the fewest visits come first, in random order. The
    prompts of the current step are not counted yet, so consecutive steps may share items.

    Args:
      records: records of the data, one per item; filled from the run.
      arms: column of the records whose values are the arms, such as level or domain; or several columns, for
        combinations.
      temperature: of the softmax over values; 1, 0.4 and 0.2 in the paper, lower for more similar values.
      rate: step size of the values.
      decay_unsampled: move the values of arms without rows in the step towards 0, as in the released code.

    Returns:
      A `Selection`. All values start at 0, so all arms are equally likely.

    Raises:
      ValueError: for a column that a record lacks, a single arm, or a number out of range.

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
    """Values of the arms updated with the rows of a step.

    Args:
      value: values before the step.
      arm: index of each row's arm.
      signal: learning signal of each row.
      there: true for rows that count.
      rate: step size of the values.
      decay_unsampled: move the values of arms without rows towards 0 instead of keeping them.

    Returns:
      The new values.
    """
    chex.assert_rank([value, arm, signal, there], 1)
    chex.assert_equal_shape([arm, signal, there])
    mean, met = means_of(signal, arm, there, len(value))
    moved = (1.0 - rate) * value + rate * mean
    return moved if decay_unsampled else jnp.where(met, moved, value)
