"""More samples of a prompt than are trained: all of them vote, the first ones are trained on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, numbers_before, require_inside


@ranged
def voted(inner: Plan, *, samples_per_prompt: Count, samples_voted: Count) -> Plan:
    """`samples_voted` completions of each prompt are rewarded together, and the first `samples_per_prompt` are trained
    on.

    For rewards that come of a vote (`voted_answer`): more votes make a better label, and cost no update.
    `voted_reward` is the mean reward of all of them, which is the share of the majority there.

    Args:
      inner: the plain plan.
      samples_per_prompt: rows of a group that learn.
      samples_voted: rows of a group that are sampled.

    Raises:
      ValueError: for fewer votes than rows that learn, or around another plan.

    Reference: TTRL (2504.16084).
    """
    require_inside("voted", inner, "one_round", "equal_groups", "one_group_a_prompt", "drawn_by_policy")
    if samples_voted < samples_per_prompt:
        raise ValueError(
            f"samples_voted is {samples_voted}, but rollout.samples_per_prompt {samples_per_prompt} of them learn; "
            "sample at least as many as learn"
        )
    if inner.drawn != samples_per_prompt or inner.provides or inner.reads_rewards:
        raise ValueError("rollout.plan.voted samples the groups itself; leave out the plan inside of it")

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        return (Request(prompts, samples_voted, first_sample=numbers_before(prompts, samples_voted)),)

    def result(rows: Experience) -> tuple[Experience, dict[str, Array]]:
        there = (rows.weight > 0).astype(jnp.float32)
        mean = (jnp.where(there > 0, rows["rewards"], 0.0)).sum() / jnp.maximum(there.sum(), 1.0)

        def first(x: Array) -> Array:
            grouped = x.reshape(-1, samples_voted, *x.shape[1:])
            return grouped[:, :samples_per_prompt].reshape(-1, *x.shape[1:])

        return jax.tree.map(first, rows), {"voted_reward": mean}

    return inner._replace(
        requests=requests,
        merge=lambda carry, rows: rows,
        result=result,
        drawn=samples_voted,
        reads_rewards=True,
        reports=inner.reports | {"voted_reward"},
    )
