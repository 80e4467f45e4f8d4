"""Rounds of more samples for the prompts whose mean reward is most uncertain."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, NonNegative, OpenShare, Range, ranged
from jaxrl_llm.rollout.plans.plan import (
    Plan,
    Request,
    concatenated,
    finished,
    first_requests,
    numbers_before,
    require_inside,
)
from jaxrl_llm.selection import next_rollouts


class Sampled(NamedTuple):
    """The rows of the rounds so far, and the number of completed steps."""

    rows: Experience | None
    step: Int[Array, ""]


@ranged
def prioritized(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    first_samples: Annotated[int, Range(2)] = 4,
    rounds: Count = 1,
    confidence: OpenShare = 0.95,
    exploration: NonNegative = 1.0,
    clock: Literal["step", "rollouts"] = "step",
) -> Plan:
    """A first round of equally many samples, then rounds whose samples go to the prompts of largest priority.

    The priority is `rollout_priority` of the rewards of all earlier rounds. A step of N prompts has
    N * `samples_per_prompt` rows; further round r of R has N * (k_r - k_{r-1}) of them, with
    k_r = floor(r * (samples_per_prompt - first_samples) / R).

    Args:
      inner: the plan whose samples are allotted.
      samples_per_prompt: the mean.
      first_samples: of each prompt in the first round, at least 2, so that they have a deviation.
      rounds: further rounds. The rewards are read before each.
      confidence, exploration: see `rollout_priority`.
      clock: T of the exploration term: completed steps with this plan, or rollouts of the step so far.

    Raises:
      ValueError: for fewer than two first samples, or further rounds of less than a sample per prompt in the mean.

    Reference: XRPO (2510.06672).
    Certainty: reconstructed
    """
    require_inside("prioritized", inner, "one_round", "equal_groups", "one_group_a_prompt", "any_number")
    extra = samples_per_prompt - first_samples
    if extra < rounds:
        raise ValueError(
            f"rollout.samples_per_prompt is {samples_per_prompt}, but prioritized has first_samples {first_samples} "
            f"and rounds {rounds}; it must be at least {first_samples + rounds}, so that each round has "
            "a sample per prompt in the mean"
        )
    # Samples per prompt, in the mean, after each round.
    means = [first_samples + extra * number // rounds for number in range(rounds + 1)]

    def requests(memory: Any, carry: Sampled | None, prompts: Prompts) -> tuple[Request, ...]:
        (one,) = first_requests(inner, memory, prompts)
        count = prompts.tokens.shape[0]
        before = numbers_before(prompts, first_samples + count * extra)
        if carry is None or carry.rows is None:
            return (one._replace(samples_per_prompt=first_samples, first_sample=before),)
        rows = carry.rows
        so_far = rows.group.shape[0]
        more = count * means[means.index(so_far // count) + 1] - so_far
        given = next_rollouts(
            rows["rewards"],
            rows.group,
            rows.weight,
            carry.step if clock == "step" else None,
            rollouts=more,
            confidence=confidence,
            exploration=exploration,
        )
        number = jnp.arange(count, dtype=jnp.int32)
        prompt_of = jnp.repeat(number, jax.ops.segment_sum(given, rows.group, count), total_repeat_length=more)
        return (one._replace(samples_per_prompt=more, prompt_of=prompt_of, first_sample=before + _sizes(rows, count)),)

    def merge(carry: Sampled, rows: Experience) -> Sampled:
        rows, _ = finished(inner, rows)
        return carry._replace(rows=rows if carry.rows is None else concatenated(carry.rows, rows))

    def result(carry: Sampled) -> tuple[Experience, dict[str, Array]]:
        assert carry.rows is not None  # all rounds are over
        order = jnp.argsort(carry.rows.group, stable=True)
        sizes = _sizes(carry.rows, order.shape[0] // samples_per_prompt)
        report = {"largest_group": sizes.max(), "smallest_group": sizes.min()}
        return jax.tree.map(lambda x: x[order], carry.rows), report

    return inner._replace(
        init=lambda memory, key, prompts, rows: Sampled(None, memory),
        requests=requests,
        merge=merge,
        result=result,
        memory=lambda: jnp.int32(0),
        remember=lambda memory, rows: memory + 1,
        samples=samples_per_prompt,
        drawn=first_samples,
        most_rounds=1 + rounds,
        unrolled=True,
        reads_rewards=True,
        reports=frozenset({"largest_group", "smallest_group"}),
        needs=inner.needs | {"uneven_groups", "numbered_samples"},
        lacks=inner.lacks | {"one_round", "equal_groups"},
    )


def _sizes(rows: Experience, prompts: int) -> Int[Array, "N"]:
    return jnp.bincount(rows.group, length=prompts).astype(jnp.int32)
