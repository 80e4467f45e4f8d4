"""Several rounds of sampling before an update: sample, test, go on with the rest or with new prompts, within limits.

    refill     DAPO: groups of equal rewards are left out and new prompts sampled in their place
    adaptive   Reinforce-Ada: prompts are sampled until they have right and wrong samples enough
    budget     Knapsack RL: one round in which prompts get samples by what these are worth

The first two are loops of three pure functions. They run inside the training program where every reward is traceable,
and around its pieces, with the rewards between them, where one is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.rollout.round_options import Adaptive, Budget, Refill
from jaxrl_llm.selection import balanced_samples, finished_prompts, knapsack_rollouts

# Names of per-row fields that rounds bring along, beside those of `Experience`.
POOL_FIELDS = frozenset({"label", "pool_mean", "pool_count"})
SUCCESS = "rollout:success"
# What is reported of the rounds of a step.
REPORTED = frozenset(
    {"rounds", "groups_sampled", "groups_kept", "samples_drawn", "prompts_unfinished", "sampled_accuracy"}
)


@struct.dataclass
class Success:
    """How often each prompt was answered rightly at its last visit.

    Attributes:
      rate: share of right samples.
      seen: whether there was a visit.
    """

    rate: Float[Array, "I"]
    seen: Bool[Array, "I"]


def never_visited(budget: Budget) -> Success:
    """Before the first step.

    Raises:
      ValueError: where the number of prompts is not known.
    """
    if budget.prompt_ids is None:
        raise ValueError("rollout.budget.prompt_ids is not set; give the number above all ids of prompts")
    return Success(jnp.zeros(budget.prompt_ids), jnp.zeros(budget.prompt_ids, bool))


def prompt_of_each_row(budget: Budget, success: Success, prompts: Prompts, samples_per_prompt: int) -> Int[Array, "B"]:
    """Which prompt each of N * samples_per_prompt rows belongs to, in ascending order."""
    counts = knapsack_rollouts(
        success.rate[prompts.prompt_id],
        success.seen[prompts.prompt_id],
        samples_per_prompt=samples_per_prompt,
        least=budget.least,
        most=budget.most,
        rule=budget.rule,
        alpha=budget.alpha,
    )
    count = prompts.prompt_id.shape[0]
    return jnp.repeat(jnp.arange(count, dtype=jnp.int32), counts, total_repeat_length=count * samples_per_prompt)


def visited(success: Success, rows: Experience) -> Success:
    """After rows whose `correct` is known."""
    assert rows.correct is not None  # `with_rewards` has filled it
    count = rows.group.shape[0]
    right = jax.ops.segment_sum(rows.correct * rows.weight, rows.group, count)
    total = jax.ops.segment_sum(rows.weight, rows.group, count)
    rate = (right / jnp.maximum(total, 1e-30))[rows.group]
    to = jnp.where(rows.weight > 0, rows.prompt_id, success.rate.shape[0])
    return Success(success.rate.at[to].set(rate, mode="drop"), success.seen.at[to].set(True, mode="drop"))


class Loop(NamedTuple):
    """Rounds as pure functions of a carry, which holds what is kept so far.

    Attributes:
      start: one round's rows, as shapes -> the carry before the first round.
      request: carry -> what `sample` is to be asked for in the next round.
      merge: (carry, the round's rows with their rewards) -> carry.
      unfinished: carry -> whether there is another round.
      result: carry -> (rows of the step, what to report of its rounds).
      first_item: carry -> number of the first prompt of the next round among those of the step.
    """

    start: Callable[[Experience], Any]
    request: Callable[[Any], Request]
    merge: Callable[[Any, Experience], Any]
    unfinished: Callable[[Any], Array]
    result: Callable[[Any], tuple[Experience, dict[str, Array]]]
    first_item: Callable[[Any], Array]


class Request(NamedTuple):
    """What one round samples.

    Attributes:
      first_prompt: of the prompts of the step.
      first_sample: number of the first sample of a prompt.
      active: which of the prompts.
    """

    first_prompt: Array
    first_sample: Array
    active: Bool[Array, "N"]


def refill_loop(refill: Refill, *, prompts: int, samples: int) -> Loop:
    """Rounds of new prompts until `prompts` groups are informative."""

    class Kept(NamedTuple):
        rows: Experience
        groups: Array
        round: Array
        right: Array

    def start(rows: Experience) -> Kept:
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rows)
        group = jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), samples)
        empty = replace(empty, group=group, prompt_length=jnp.ones_like(empty.prompt_length))
        return Kept(empty, jnp.int32(0), jnp.int32(0), jnp.float32(0))

    def request(kept: Kept) -> Request:
        return Request(kept.round * prompts, jnp.int32(0), jnp.ones(prompts, bool))

    def merge(kept: Kept, rows: Experience) -> Kept:
        value = rows.correct if refill.metric == "correct" else rows.rewards
        assert value is not None
        assert rows.correct is not None
        by_group = value.reshape(prompts, samples)
        informative = (by_group.max(1) > by_group.min(1)) | (samples == 1)
        place = jnp.where(informative, kept.groups + jnp.cumsum(informative) - 1, prompts)

        def put(old: Array, new: Array) -> Array:
            split = lambda x: x.reshape(prompts, samples, *x.shape[1:])  # noqa: E731
            return split(old).at[place].set(split(new), mode="drop").reshape(old.shape)

        merged = replace(jax.tree.map(put, kept.rows, rows), group=kept.rows.group)
        groups = jnp.minimum(kept.groups + informative.sum(), prompts).astype(jnp.int32)
        return Kept(merged, groups, kept.round + 1, kept.right + rows.correct.sum())

    def result(kept: Kept) -> tuple[Experience, dict[str, Array]]:
        sampled = kept.round * prompts
        report = {
            "rounds": kept.round,
            "groups_sampled": sampled,
            "groups_kept": kept.groups,
            "sampled_accuracy": kept.right / (sampled * samples),
        }
        return kept.rows, report

    return Loop(
        start,
        request,
        merge,
        lambda kept: (kept.groups < prompts) & (kept.round < refill.max_rounds),
        result,
        lambda kept: kept.round * prompts,
    )


def adaptive_loop(adaptive: Adaptive, *, prompts: int, samples: int) -> Loop:
    """Rounds of more samples of the prompts that need them."""
    each, most = adaptive.samples_per_round, adaptive.max_rounds * adaptive.samples_per_round

    class Pool(NamedTuple):
        rows: Experience
        label: Array
        drawn: Array
        round: Array

    split = lambda x: x.reshape(prompts, -1, *x.shape[1:])  # noqa: E731

    def start(rows: Experience) -> Pool:
        def room(x):
            return jnp.zeros((prompts, most, *x.shape[1:]), x.dtype)

        nothing = jnp.zeros((prompts, most))
        return Pool(jax.tree.map(room, rows), nothing, nothing.astype(bool), jnp.int32(0))

    def active(pool: Pool) -> Array:
        # Before the first round nothing is finished.
        return ~finished_prompts(pool.label, pool.drawn, kept=samples, both_kinds=adaptive.both_kinds)

    def request(pool: Pool) -> Request:
        return Request(jnp.int32(0), pool.round * each, active(pool))

    def merge(pool: Pool, rows: Experience) -> Pool:
        assert rows.rewards is not None
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, split(new), pool.round * each, 1)  # noqa: E731
        label = (rows.rewards > adaptive.threshold).astype(jnp.float32)
        return Pool(
            jax.tree.map(put, pool.rows, rows), put(pool.label, label), put(pool.drawn, rows.weight > 0), pool.round + 1
        )

    def result(pool: Pool) -> tuple[Experience, dict[str, Array]]:
        places, there = balanced_samples(pool.label, pool.drawn, kept=samples)

        def chosen(x):
            index = places.reshape(*places.shape, *[1] * (x.ndim - 2))
            return jnp.take_along_axis(x, index, axis=1).reshape(-1, *x.shape[2:])

        rows, drawn = jax.tree.map(chosen, pool.rows), pool.drawn.sum(1).astype(jnp.float32)
        mean = jnp.where(pool.drawn, pool.label, 0.0).sum(1) / jnp.maximum(drawn, 1.0)
        per_row = lambda x: jnp.repeat(x, samples)  # noqa: E731
        pool_fields = {"label": chosen(pool.label), "pool_mean": per_row(mean), "pool_count": per_row(drawn)}
        weight = there.reshape(-1).astype(jnp.float32)
        rows = replace(
            rows,
            group=jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), samples),
            weight=weight,
            mask=rows.mask * weight[:, None],
            prompt_length=jnp.maximum(rows.prompt_length, 1),
            extras=rows.extras | pool_fields,
        )
        report = {
            "rounds": pool.round,
            "samples_drawn": drawn.sum(),
            "prompts_unfinished": active(pool).sum(),
            "sampled_accuracy": (mean * drawn).sum() / drawn.sum(),
        }
        return rows, report

    return Loop(
        start,
        request,
        merge,
        lambda pool: jnp.any(active(pool)) & (pool.round < adaptive.max_rounds),
        result,
        lambda pool: jnp.int32(0),
    )
