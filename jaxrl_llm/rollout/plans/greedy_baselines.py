"""A greedy completion of each prompt, whose reward is the baseline of its samples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Positive, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, concatenated, require_inside


@ranged
def greedy_baseline(inner: Plan, *, temperature: Positive) -> Plan:
    """One more, greedy completion of each prompt; the samples know its reward as `baseline_rewards`.

    Args:
      inner: how the samples are drawn.
      temperature: of the samples.
    """
    require_inside("greedy_baseline", inner, "one_round", "equal_groups", "one_group_a_prompt", "one_temperature")
    drawn, samples = inner.drawn, inner.samples

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        first, *others = inner.requests(memory, carry, prompts)
        each = jnp.full(drawn + 1, temperature).at[drawn:].set(0.0)
        prefixes = first.prefixes
        if prefixes is not None:  # the greedy completion starts as the last sample does
            prefixes = jax.tree.map(_with_last_again, prefixes)
        return first._replace(samples_per_prompt=drawn + 1, temperature=each, prefixes=prefixes), *others

    def _with_last_again(x: Array) -> Array:
        split = x.reshape(-1, drawn, *x.shape[1:])
        return jnp.concatenate([split, split[:, -1:]], axis=1).reshape(-1, *x.shape[1:])

    def merge(carry: Any, rows: Experience) -> tuple[Any, Array]:
        groups = rows.tokens.shape[0] // (samples + 1)
        first, others = (
            jax.tree.map(lambda x: x[part], rows)  # noqa: B023
            for part in (slice(groups * (drawn + 1)), slice(groups * (drawn + 1), None))
        )
        split = jax.tree.map(lambda x: x.reshape(groups, drawn + 1, *x.shape[1:]), first)
        sampled = jax.tree.map(lambda x: x[:, :drawn].reshape(-1, *x.shape[2:]), split)
        greedy = jax.tree.map(lambda x: x[:, drawn], split)
        return inner.merge(carry, concatenated(sampled, others)), greedy["rewards"]

    def result(carry: tuple[Any, Array]) -> tuple[Experience, dict[str, Array]]:
        rows, report = inner.result(carry[0])
        return rows.filled(baseline_rewards=jnp.repeat(carry[1], samples)), report

    return inner._replace(
        requests=requests,
        merge=merge,
        result=result,
        reads_rewards=True,
        provides=inner.provides | {"baseline_rewards"},
        needs=inner.needs | {"temperatures"},
        lacks=inner.lacks | {"any_number"},
    )
