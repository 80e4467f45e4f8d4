"""Allocation of the samples of a step by their value."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, OpenShare, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, numbers_before, require_inside
from jaxrl_llm.selection import knapsack_rollouts


@struct.dataclass
class Success:
    """The success rate of each prompt at its last visit.

    Attributes:
      rate: share of right samples.
      seen: whether there was a visit.
    """

    rate: Float[Array, "I"]
    seen: Bool[Array, "I"]


@ranged
def budget(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    prompt_ids: Count,
    least: Count = 2,
    most: Count = 128,
    rule: Literal["probability", "expectation"] = "probability",
    alpha: OpenShare = 0.9,
) -> Plan:
    """One round in which the number of samples of a prompt depends on their value, from its success at its last visit.

    Args:
      inner: the plan whose samples are shared out.
      samples_per_prompt: the mean.
      prompt_ids: prompts have ids below this; the success of each is remembered.
      least, most, rule, alpha: see `knapsack_rollouts`.

    Raises:
      ValueError: for a mean outside of [least, most], or no ids.

    Reference: Knapsack RL (2509.25849).
    """
    require_inside("budget", inner, "one_round", "one_group_a_prompt", "any_number")
    if not least <= samples_per_prompt <= most:
        raise ValueError(
            f"rollout.samples_per_prompt is {samples_per_prompt}, but budget has least {least} and most {most}; it is "
            "the mean and must lie between them"
        )

    def requests(memory: Success, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        (one,) = inner.requests(memory, carry, prompts)
        counts = knapsack_rollouts(
            memory.rate[prompts.prompt_id],
            memory.seen[prompts.prompt_id],
            samples_per_prompt=samples_per_prompt,
            least=least,
            most=most,
            rule=rule,
            alpha=alpha,
        )
        count = prompts.prompt_id.shape[0]
        rows = count * samples_per_prompt
        number = jnp.arange(count, dtype=jnp.int32)
        prompt_of = jnp.repeat(number, counts, total_repeat_length=rows)
        before = numbers_before(prompts, most)
        return (one._replace(samples_per_prompt=rows, prompt_of=prompt_of, first_sample=before),)

    def remember(memory: Success, rows: Experience) -> Success:
        count = rows.group.shape[0]
        right = jax.ops.segment_sum(rows["correct"] * rows.weight, rows.group, count)
        total = jax.ops.segment_sum(rows.weight, rows.group, count)
        rate = (right / jnp.maximum(total, 1e-30))[rows.group]
        to = jnp.where(rows.weight > 0, rows.prompt_id, memory.rate.shape[0])
        return Success(memory.rate.at[to].set(rate, mode="drop"), memory.seen.at[to].set(True, mode="drop"))

    return inner._replace(
        requests=requests,
        memory=lambda: Success(jnp.zeros(prompt_ids), jnp.zeros(prompt_ids, bool)),
        remember=remember,
        needs=inner.needs | {"uneven_groups"},
        lacks=inner.lacks | {"equal_groups"},
    )
