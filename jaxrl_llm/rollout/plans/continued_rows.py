"""Completions that are sampled over two steps: the next step finishes the unfinished completions of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, Natural, ranged
from jaxrl_llm.rollout.plans.further_rows import prompts_of
from jaxrl_llm.rollout.plans.plan import Plan, Request, numbers_before, require_inside
from jaxrl_llm.rollout.prefixes import Prefixes
from jaxrl_llm.rows import empty_rows


@ranged
def partial_rollouts(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    prompts_per_step: Count,
    max_prompt_tokens: Count,
    max_completion_tokens: Count,
    pad_id: Natural,
    tokens_per_step: Count,
) -> Plan:
    """A step begins completions of its prompts, `tokens_per_step` tokens of each, and finishes those of the last step.

    Both are decoded side by side, so a step waits for at most the larger of `tokens_per_step` and what is left behind
    them, and not for the longest completion. It learns from the groups that it finishes; the first step from none. What
    was written before keeps the log-probabilities that it was drawn with, and the random numbers of the step that it
    was begun in: under one policy a completion is the one that it would have been in one piece.

    Args:
      inner: the plain plan.
      samples_per_prompt: rows of a group.
      prompts_per_step: groups of a step.
      max_prompt_tokens, max_completion_tokens: widths.
      pad_id: fills what is shorter.
      tokens_per_step: tokens of a completion in its first step; at least half of the longest.

    Raises:
      ValueError: for less than half, or all, of the longest completion, or around another plan.

    Reference: Kimi k1.5 (2501.12599).
    Certainty: recalled
    """
    require_inside("partial_rollouts", inner, "one_round", "equal_groups", "one_group_a_prompt", "any_number")
    if not max_completion_tokens <= 2 * tokens_per_step < 2 * max_completion_tokens:
        raise ValueError(
            f"partial_rollouts.tokens_per_step is {tokens_per_step} of rollout.max_completion_tokens "
            f"{max_completion_tokens}; a completion takes two steps, so give it at least half and not all"
        )
    if inner.drawn != samples_per_prompt or inner.provides or inner.reads_rewards:
        raise ValueError("rollout.plan.partial_rollouts draws the groups itself; leave out the plan inside of it")
    count = prompts_per_step * samples_per_prompt

    def memory() -> Experience:
        rows = empty_rows(count, max_prompt_tokens, max_completion_tokens, max_completion_tokens)
        group = jnp.repeat(jnp.arange(prompts_per_step, dtype=jnp.int32), samples_per_prompt)
        return jax.tree.map(jnp.copy, replace(rows, group=group))

    def requests(begun: Experience, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        if prompts.tokens.shape[1] != max_prompt_tokens or prompts.answer_tokens.shape[1] != max_completion_tokens:
            raise ValueError(
                f"partial_rollouts keeps prompts of rollout.max_prompt_tokens {max_prompt_tokens} and answers of "
                f"{max_completion_tokens} tokens, but the step was handed widths {prompts.tokens.shape[1]} and "
                f"{prompts.answer_tokens.shape[1]}; hand it these, and leave rollout.prompt_buckets out"
            )
        first = lambda x: x[::samples_per_prompt]  # noqa: E731
        both = lambda new, old: jnp.concatenate([jnp.asarray(new), old])  # noqa: E731
        nothing, there = jnp.zeros(prompts_per_step, jnp.int32), first(begun.weight) > 0
        width = max_completion_tokens - 1
        held = Prefixes(begun.tokens[:, :width], jnp.where(begun.weight > 0, begun.length, 0), begun.source[:, :width])
        blank = Prefixes(jnp.full_like(held.tokens, pad_id), jnp.zeros(count, jnp.int32), jnp.zeros_like(held.source))
        number = jnp.broadcast_to(jnp.asarray(numbers_before(prompts, samples_per_prompt), jnp.int32), nothing.shape)
        short = jnp.full(count, tokens_per_step, jnp.int32)
        request = Request(
            _followed_by(prompts, begun, samples_per_prompt),
            samples_per_prompt,
            first_sample=both(number, first(begun.sample)),
            active=both(jnp.ones(prompts_per_step, bool), there),
            prefixes=jax.tree.map(lambda new, old: jnp.concatenate([new, old]), blank, held),
            limit=both(short, jnp.full_like(short, max_completion_tokens)),
            begun=both(nothing, jnp.ones_like(nothing)),
        )
        return (request,)

    def merge(carry: tuple[Experience, Any], rows: Experience) -> tuple[Experience, Any]:
        return carry[0], rows

    def result(carry: tuple[Experience, Any]) -> tuple[Experience, dict[str, Array]]:
        begun, rows = carry
        new, old = (jax.tree.map(lambda x: x[part], rows) for part in (slice(count), slice(count, None)))  # noqa: B023
        before = jnp.arange(max_completion_tokens) < begun.length[:, None]
        finished = replace(
            old,
            group=old.group - prompts_per_step,
            behaviour_logprobs=jnp.where(before, begun.behaviour_logprobs, old.behaviour_logprobs),
            behaviour_entropy=jnp.where(before, begun.behaviour_entropy, old.behaviour_entropy),
        )
        kept = {f"waiting/{name}": getattr(new, name) for name in _KEPT}
        return finished.filled(**kept), {"waiting_share": (new.truncated).mean()}

    def remember(begun: Experience, rows: Experience) -> Experience:
        now = {name: rows[f"waiting/{name}"].astype(getattr(begun, name).dtype) for name in _KEPT}
        return replace(begun, **now, weight=jnp.ones_like(begun.weight))

    return inner._replace(
        init=lambda memory, key, prompts, rows: (memory, None),
        requests=requests,
        merge=merge,
        result=result,
        memory=memory,
        remember=remember,
        drawn=samples_per_prompt,
        unrolled=True,
        reports=inner.reports | {"waiting_share"},
        needs=inner.needs | {"prefixes", "active_prompts", "pauses"},
        lacks=inner.lacks | {"one_round", "drawn_by_policy", "any_number", "prompts_of_step"},
    )


_PROMPT = ("prompt_tokens", "prompt_length", "prompt_id", "answer_tokens", "answer_length")
_KEPT = (*_PROMPT, "sample", "tokens", "length", "source", "behaviour_logprobs", "behaviour_entropy")


def _followed_by(prompts: Prompts, begun: Experience, samples_per_prompt: int) -> Prompts:
    """New prompts, followed by the prompts of the unfinished groups."""
    both = (replace(one, fields={}) for one in (prompts, prompts_of(begun, samples_per_prompt)))
    return jax.tree.map(lambda new, old: jnp.concatenate([jnp.asarray(new), old]), *both)
