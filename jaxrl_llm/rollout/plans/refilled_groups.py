"""Further prompts that replace groups with equal rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, empty_like, finished, first_requests, require_inside


@ranged
def refill(
    inner: Plan, *, samples_per_prompt: Count, max_rounds: Count = 10, metric: Literal["correct", "rewards"] = "correct"
) -> Plan:
    """Rounds of new prompts until the step has enough informative groups.

    A step is handed `max_rounds` times its prompts; those that it does not come to are not seen in this epoch. Places
    that are empty at the end have weight 0.

    Args:
      inner: the plan of one round.
      samples_per_prompt: rows of a group.
      max_rounds: batches of prompts at most.
      metric: what must differ within a group that is kept.

    Raises:
      ValueError: for fewer than one round.

    Reference: DAPO (2503.14476).
    """
    require_inside("refill", inner, "one_round", "equal_groups", "one_group_a_prompt")
    samples = samples_per_prompt

    class Kept(NamedTuple):
        rows: Experience
        groups: Array
        round: Array
        right: Array

    def part(prompts: Prompts, number: Any) -> Prompts:
        given = prompts.tokens.shape[0]
        if given % max_rounds:
            raise ValueError(
                f"refill.max_rounds is {max_rounds}, but the step was handed {given} prompts; hand it {max_rounds} "
                "times the prompts that it learns from"
            )
        count = given // max_rounds
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * count, count), prompts)

    def init(memory: Any, key: Array, prompts: Prompts, rows: Experience) -> Kept:
        rows = jax.eval_shape(lambda rows: finished(inner, rows)[0], rows)
        empty, count = empty_like(rows), rows.tokens.shape[0] // samples
        group = jnp.repeat(jnp.arange(count, dtype=jnp.int32), samples)
        empty = replace(empty, group=group, prompt_length=jnp.ones_like(empty.prompt_length))
        return Kept(empty, jnp.int32(0), jnp.int32(0), jnp.float32(0))

    def requests(memory: Any, kept: Kept, prompts: Prompts) -> tuple[Request, ...]:
        return first_requests(inner, memory, part(prompts, 0 if kept is None else kept.round))

    def merge(kept: Kept, rows: Experience) -> Kept:
        rows, _ = finished(inner, rows)
        count = rows.tokens.shape[0] // samples
        there = (rows.weight > 0).reshape(count, samples)
        most, least = (jnp.where(there, rows[metric].reshape(count, samples), limit) for limit in (-jnp.inf, jnp.inf))
        informative = (most.max(1) > least.min(1)) | (there.any(1) & (samples == 1))
        place = jnp.where(informative, kept.groups + jnp.cumsum(informative) - 1, count)

        def put(old: Array, new: Array) -> Array:
            split = lambda x: x.reshape(count, samples, *x.shape[1:])  # noqa: E731
            return split(old).at[place].set(split(new), mode="drop").reshape(old.shape)

        merged = replace(jax.tree.map(put, kept.rows, rows), group=kept.rows.group)
        groups = jnp.minimum(kept.groups + informative.sum(), count).astype(jnp.int32)
        return Kept(merged, groups, kept.round + 1, kept.right + (rows["correct"] * (rows.weight > 0)).sum())

    def result(kept: Kept) -> tuple[Experience, dict[str, Array]]:
        sampled = kept.round * (kept.rows.tokens.shape[0] // samples)
        return kept.rows, {
            "rounds": kept.round,
            "groups_sampled": sampled,
            "groups_kept": kept.groups,
            "sampled_accuracy": kept.right / (sampled * samples),
        }

    def unfinished(kept: Kept) -> Array:
        return (kept.groups < kept.rows.tokens.shape[0] // samples) & (kept.round < max_rounds)

    return inner._replace(
        init=init,
        requests=requests,
        merge=merge,
        unfinished=unfinished,
        result=result,
        most_rounds=max_rounds,
        prompts_per_group=max_rounds,
        reads_rewards=True,
        reports=frozenset({"rounds", "groups_sampled", "groups_kept", "sampled_accuracy"}),
        lacks=inner.lacks | {"one_round"},
    )
