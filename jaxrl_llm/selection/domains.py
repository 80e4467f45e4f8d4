"""Sampling shares of domains by the distance of their rewards from a target."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Count, Positive, Share, ranged
from jaxrl_llm.selection.pools import Records, items_by_turns, means_of, pool, visited


class Domains(NamedTuple):
    """State of `domain_aware`.

    Attributes:
      reward: running mean reward of each domain.
      seen: whether each domain has had rows.
      share: share of each domain since the last refresh.
      steps: steps trained on.
      visits: steps in which each item was trained on.
    """

    reward: Float[Array, "D"]
    seen: Bool[Array, "D"]
    share: Float[Array, "D"]
    steps: Int[Array, ""]
    visits: Int[Array, "I"]


@ranged
def deficit_shares(reward: Float[Array, "D"], *, target: float = 1.0, temperature: Positive = 0.3) -> Float[Array, "D"]:
    """Shares of domains: exp(v_d / temperature) / sum_e exp(v_e / temperature), v_d = max(0, target - reward_d).

    Args:
      reward: mean reward of each domain.
      target: reward at and above which v is 0.
      temperature: of the softmax.

    Returns:
      Shares with sum 1.

    Raises:
      ValueError: for a temperature that is not positive.

    Reference: DADS, RuleReasoner (2506.08672).
    Certainty: verified
    """
    chex.assert_rank(reward, 1)
    return jax.nn.softmax(jnp.maximum(target - reward.astype(jnp.float32), 0.0) / temperature)


@ranged
def share_counts(share: Float[Array, "D"], *, count: Count) -> Int[Array, "D"]:
    """Slots of each domain: floor(count share_d); the remaining slots go one by one to the domains of largest share.

    Args:
      share: share of each domain, with sum 1.
      count: slots per step.

    Returns:
      Numbers of slots with sum `count`.

    Raises:
      ValueError: for a count below 1.

    Reference: DADS, RuleReasoner (2506.08672).
    Certainty: verified
    """
    chex.assert_rank(share, 1)
    # The tolerance keeps 0.3 * 10 at 3 in float32.
    whole = jnp.floor(count * share + 1e-4).astype(jnp.int32)
    rank = jnp.argsort(jnp.argsort(-share, stable=True), stable=True)
    return whole + (rank < count - whole.sum())


@ranged
def domain_aware(
    *,
    records: Records,
    domains: str | tuple[str, ...] = "domain",
    target: float = 1.0,
    temperature: Positive = 0.3,
    history: Share = 0.5,
    refresh_every_steps: Count = 8,
) -> Selection:
    """Prompts of the domains whose rewards are furthest below a target: DADS.

        r_d <- history r_d + (1 - history) mean reward of a step's rows of domain d    (the first mean as it is)
        share_d = exp(v_d / temperature) / sum_e exp(v_e / temperature),    v_d = max(0, target - r_d)

    A step has floor(N share_d) prompts of domain d, and one more of each domain of largest share until there are N.
    Within a domain items are taken in rotation. A domain without rows in a step keeps its mean; shares are equal at
    first.

    Args:
      records: records of the data, one per item; filled from the run.
      domains: column of the records whose values are the domains, or several columns, for combinations.
      target: reward at and above which v is 0.
      temperature: of the softmax.
      history: decay of the running mean.
      refresh_every_steps: steps between two updates of the shares.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for a column that a record lacks, a single domain, or a number out of range.

    Reference: DADS, RuleReasoner (2506.08672).
    Certainty: verified
    """
    made = pool(records, domains, name="domains")
    count_of_domains = len(made.kinds)

    def init() -> Domains:
        zero = jnp.zeros(count_of_domains, jnp.float32)
        visits = jnp.zeros(len(made.ids), jnp.int32)
        return Domains(zero, zero > 0, zero + 1.0 / count_of_domains, jnp.int32(0), visits)

    def choose(memory: Domains, key: Array, count: int) -> Int[Array, "N"]:
        ends = jnp.cumsum(share_counts(memory.share, count=count))
        of_slot = jnp.searchsorted(ends, jnp.arange(count), side="right")
        return items_by_turns(of_slot, made.of_item, memory.visits, key, made.ids, count_of_domains)

    def update(
        memory: Domains, item: Int[Array, "B"], rewards: Float[Array, "B"], weight: Float[Array, "B"]
    ) -> Domains:
        mean, met = means_of(rewards, jnp.asarray(made.of_item)[item], weight, count_of_domains)
        moved = jnp.where(memory.seen, history * memory.reward + (1.0 - history) * mean, mean)
        reward, seen = jnp.where(met, moved, memory.reward), memory.seen | met
        steps = memory.steps + 1
        share = deficit_shares(reward, target=target, temperature=temperature)
        share = jnp.where(steps % refresh_every_steps == 0, share, memory.share)
        return Domains(reward, seen, share, steps, visited(memory.visits, item, weight))

    def report(memory: Domains) -> dict[str, Array]:
        told = {f"reward/{label}": memory.reward[d] for d, label in enumerate(made.labels)}
        return told | {f"chance/{label}": memory.share[d] for d, label in enumerate(made.labels)}

    return Selection(init, choose, update, report)
