"""Sampling of each prompt until it has enough right and wrong completions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, finished, first_requests, numbers_before, require_inside
from jaxrl_llm.selection import balanced_samples, finished_prompts


class Pool(NamedTuple):
    """Samples of each prompt so far.

    Attributes:
      rows: with two leading axes, prompts and samples.
      label: 1 if the reward is above the threshold.
      drawn: which samples exist.
      round: rounds so far.
    """

    rows: Experience
    label: Array
    drawn: Array
    round: Array


def _chosen(places: Array, x: Array) -> Array:
    """Rows at these positions of each prompt, in order."""
    index = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1).reshape(-1, *x.shape[2:])


@ranged
def adaptive(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    max_rounds: Count = 4,
    samples_per_round: Count = 8,
    threshold: float = 0.7,
    both_kinds: bool = True,
) -> Plan:
    """Rounds of more samples of the prompts that need them; `samples_per_prompt` of them are kept.

    Rows bring `label` (1 where the reward is above `threshold`), `pool_mean` and `pool_count` (of all samples of the
    prompt), for `pool_centred`.

    Args:
      inner: the plan of one round.
      samples_per_prompt: rows of a group that are kept.
      max_rounds: rounds at most.
      samples_per_round: samples of a prompt in each.
      threshold: reward above which a sample is right.
      both_kinds: see `finished_prompts`.

    Raises:
      ValueError: for sizes below 1, or fewer samples at most than are kept.

    Reference: Reinforce-Ada (2510.04996).
    """
    require_inside("adaptive", inner, "one_round", "equal_groups", "one_group_a_prompt", "any_number")
    kept, each, most = samples_per_prompt, samples_per_round, max_rounds * samples_per_round
    if most < kept:
        raise ValueError(
            f"rollout.samples_per_prompt is {kept}, but adaptive draws at most {max_rounds} x {samples_per_round} "
            "samples of a prompt; keep fewer or draw more"
        )

    split = lambda x: x.reshape(-1, each, *x.shape[1:])  # noqa: E731

    def init(memory: Any, key: Array, prompts: Prompts, rows: Experience) -> Pool:
        count = rows.tokens.shape[0] // each
        nothing = jnp.zeros((count, most))
        room = jax.tree.map(lambda x: jnp.zeros((count, most, *x.shape[1:]), x.dtype), rows)
        return Pool(room, nothing, nothing.astype(bool), jnp.int32(0))

    def active(pool: Pool) -> Array:
        # Before the first round nothing is finished.
        return ~finished_prompts(pool.label, pool.drawn, kept=kept, both_kinds=both_kinds)

    def requests(memory: Any, pool: Pool | None, prompts: Prompts) -> tuple[Request, ...]:
        (one,) = first_requests(inner, memory, prompts)
        before = numbers_before(prompts, most)
        if pool is None:
            there = jnp.ones(prompts.tokens.shape[0], bool)
            return (one._replace(samples_per_prompt=each, first_sample=before, active=there),)
        return (one._replace(samples_per_prompt=each, first_sample=before + pool.round * each, active=active(pool)),)

    def merge(pool: Pool, rows: Experience) -> Pool:
        rows, _ = finished(inner, rows)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, split(new), pool.round * each, 1)  # noqa: E731
        label = (rows["rewards"] > threshold).astype(jnp.float32)
        return Pool(
            jax.tree.map(put, pool.rows, rows), put(pool.label, label), put(pool.drawn, rows.weight > 0), pool.round + 1
        )

    def result(pool: Pool) -> tuple[Experience, dict[str, Array]]:
        places, there = balanced_samples(pool.label, pool.drawn, kept=kept)
        chosen = partial(_chosen, places)
        rows, drawn = jax.tree.map(chosen, pool.rows), pool.drawn.sum(1).astype(jnp.float32)
        mean = jnp.where(pool.drawn, pool.label, 0.0).sum(1) / jnp.maximum(drawn, 1.0)
        per_row = lambda x: jnp.repeat(x, kept)  # noqa: E731
        weight = there.reshape(-1).astype(jnp.float32)
        rows = replace(
            rows,
            group=jnp.repeat(jnp.arange(pool.label.shape[0], dtype=jnp.int32), kept),
            weight=weight,
            mask=rows.mask * weight[:, None],
            prompt_length=jnp.maximum(rows.prompt_length, 1),
        ).filled(label=chosen(pool.label), pool_mean=per_row(mean), pool_count=per_row(drawn))
        return rows, {
            "rounds": pool.round,
            "samples_drawn": drawn.sum(),
            "prompts_unfinished": active(pool).sum(),
            "sampled_accuracy": (mean * drawn).sum() / drawn.sum(),
        }

    return inner._replace(
        init=init,
        requests=requests,
        merge=merge,
        unfinished=lambda pool: jnp.any(active(pool)) & (pool.round < max_rounds),
        result=result,
        drawn=each,
        most_rounds=max_rounds,
        reads_rewards=True,
        provides=inner.provides | {"label", "pool_mean", "pool_count"},
        reports=frozenset({"rounds", "samples_drawn", "prompts_unfinished", "sampled_accuracy"}),
        needs=inner.needs | {"active_prompts", "numbered_samples"},
        lacks=inner.lacks | {"one_round"},
    )
