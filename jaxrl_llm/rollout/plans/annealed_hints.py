"""Completions that continue the first pieces of the reference completion: many pieces at first, none at the end."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Experience, Prompts, Source, uniforms_at
from jaxrl_llm.ranges import Count, Natural, PositiveShare, Share, ranged
from jaxrl_llm.rollout.plans.demonstration_prefixes import cosine_share
from jaxrl_llm.rollout.plans.demonstrations_in_groups import fitted
from jaxrl_llm.rollout.plans.plan import Plan, Request, require_inside
from jaxrl_llm.rollout.prefixes import Prefixes


@ranged
def annealed_hint(
    inner: Plan,
    *,
    max_completion_tokens: Count,
    pad_id: Natural,
    total_steps: Count,
    pieces: Count = 5,
    hinted_share: PositiveShare = 0.6,
    first_share: PositiveShare = 0.95,
    last_share: Share = 0.05,
) -> Plan:
    """All completions of a prompt start with the same first pieces of its reference completion, fewer over the run.

        n ~ Binomial(pieces, p),   length = floor(n L / pieces), at most L - 1,
        p = last_share + (1 + cos(pi step / S)) / 2 (first_share - last_share) up to step S,   then 0

    where S = hinted_share * total_steps and L is the length of the reference completion. Hint tokens have
    `Source.DEMONSTRATION` and are not among the samples that a policy loss learns from; a likelihood term on them reads
    `demonstrated_part` in the place of its mask. The number of pieces depends on step and prompt alone.

    Args:
      inner: how the samples are drawn.
      max_completion_tokens: longest completion, its hint included.
      pad_id: fills what is shorter.
      total_steps: of the run.
      pieces: into how many a reference completion is cut.
      hinted_share: of the run that has hints.
      first_share, last_share: chance of each piece at the first and at the last step with hints.

    Raises:
      ValueError: where the plan inside has several rounds, or rows that the policy did not draw.

    Reference: UFT (2505.16984).
    Certainty: verified
    """
    require_inside("annealed_hint", inner, "one_round", "drawn_by_policy", "equal_groups")

    def started(step: Array, request: Request) -> Request:
        prompts, samples = request.prompts, request.samples_per_prompt
        steps = max(round(hinted_share * total_steps), 1)
        chance = cosine_share(step, first=first_share, last=last_share, steps=steps)
        uniform = uniforms_at(jax.random.key(0), step, prompts.prompt_id)
        count = binomial(uniform, jnp.where(step < steps, chance, 0.0), pieces)
        whole = prompts.fields["demonstration_length"]
        length = jnp.clip(count * whole // pieces, 0, jnp.maximum(whole - 1, 0)).astype(jnp.int32)
        tokens = fitted(prompts.fields["demonstration_tokens"], max_completion_tokens - 1, pad_id)
        inside = jnp.arange(tokens.shape[1]) < length[:, None]
        source = jnp.where(inside, Source.DEMONSTRATION, Source.PAD).astype(jnp.int8)
        hint = Prefixes(jnp.where(inside, tokens, pad_id), length, source)
        return request._replace(prefixes=jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), hint))

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        step, own = memory
        return tuple(started(step, request) for request in inner.requests(own, carry, prompts))

    def result(carry: Any) -> tuple[Experience, dict[str, Array]]:
        rows, report = inner.result(carry)
        return rows, report | {"prefix_tokens": (rows.source == Source.DEMONSTRATION).sum(1).mean()}

    return inner._replace(
        requests=requests,
        result=result,
        memory=lambda: (jnp.int32(0), inner.memory()),
        remember=lambda memory, rows: (memory[0] + 1, inner.remember(memory[1], rows)),
        reads=inner.reads | {"demonstration_tokens", "demonstration_length"},
        reports=inner.reports | {"prefix_tokens"},
        needs=inner.needs | {"prefixes", "demonstrations"},
        lacks=inner.lacks | {"any_number"},
    )


def binomial(uniform: Float[Array, "N"], chance: Float[Array, ""] | float, trials: int) -> Int[Array, "N"]:
    """Binomial numbers of successes, by the inverse distribution function at a uniform number.

    >>> binomial(jnp.array([0.1, 0.3, 0.8]), 0.5, 2).tolist()
    [0, 1, 2]
    """
    p = jnp.asarray(chance, jnp.float32)
    each = [math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials)]
    return (uniform[:, None] >= jnp.cumsum(jnp.stack(each))).sum(1).astype(jnp.int32)
