"""Prompts that show a part of the rubric while completions are sampled, less along the group and over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, Prompts, key_at
from jaxrl_llm.ranges import Count, Natural, Positive, Share, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, numbers_before, require_inside
from jaxrl_llm.rollout.rewriting import as_learned, asked_in_form


@ranged
def shown_share(
    sample: Int[Array, "..."],
    *,
    group_size: Count,
    step: Int[Array, ""] | int,
    total_steps: Count,
    midpoint: Share = 0.2,
    steepness: Positive = 125.0,
) -> Float[Array, "..."]:
    """The share of a rubric that a sample of a group is shown as a scaffold: less along the group and over time.

        (G - 1 - i) / (G - 1) / (1 + exp(steepness (x - midpoint))),   x = (step - 1) / (total_steps - 1)

    Args:
      sample: i, its number within the group, counted from 0.
      group_size: G; with 1 the first factor is 1.
      step, total_steps: of training, counted from 1.
      midpoint: share of training at which half of what is shown at first is left.
      steepness: of the decay.

    Reference: RuscaRL (2508.16949).
    Certainty: verified
    """
    along = 1.0 - jnp.asarray(sample, jnp.float32) / max(group_size - 1, 1) if group_size > 1 else 1.0
    x = (jnp.asarray(step, jnp.float32) - 1.0) / max(total_steps - 1, 1)
    return along * jax.nn.sigmoid(steepness * (midpoint - x)) * jnp.ones_like(sample, jnp.float32)


@ranged
def scaffolded(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    total_steps: Count,
    pad_id: Natural,
    encode: Callable[[str], Sequence[int]],
    separator: str = ";",
    midpoint: Share = 0.2,
    steepness: Positive = 125.0,
    trained: bool = False,
) -> Plan:
    """Samples are drawn from prompts that show some criteria of the rubric, and trained with the prompts without them.

    The data gives the prompt with all criteria (column `scaffold`): the prompt's own text with one piece put in, in
    which each criterion ends in the separator. Sample i sees round(criteria * `shown_share`) of them, halves to even,
    another choice each time; the choice depends on step, prompt and sample alone. Evaluations show none. The policy's
    log-probabilities before the update are computed under the prompts that it learns with, so that ratios start at 1;
    `sampler_gap_mean` says how far the two prompts are apart.

    Args:
      inner: the plain plan.
      samples_per_prompt: rows of a group.
      total_steps: of training.
      pad_id: in front of shorter prompts.
      encode: text -> token ids.
      separator: one token, which no criterion holds.
      midpoint, steepness: as in `shown_share`.
      trained: rows keep the scaffold when they are learned from.

    Raises:
      ValueError: for a separator that is not one token, or around another plan.

    Reference: RuscaRL (2508.16949).
    """
    needs = ("one_round", "one_group_a_prompt", "equal_groups", "one_temperature", "drawn_by_policy")
    require_inside("scaffolded", inner, *needs)
    if inner.drawn != samples_per_prompt or inner.reads_rewards or inner.provides:
        raise ValueError("rollout.plan.scaffolded samples the groups itself; leave out the plan inside of it")
    ids = list(encode(separator))
    if len(ids) != 1:
        raise ValueError(
            f"rollout.plan.scaffolded: separator {separator!r} is {len(ids)} tokens ({ids}); choose a text that is one"
        )

    def requests(step: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        count = prompts.tokens.shape[0]
        rows = jax.tree.map(lambda x: jnp.repeat(x, samples_per_prompt, axis=0), prompts)
        sample = jnp.tile(jnp.arange(samples_per_prompt), count)
        first = jnp.repeat(jnp.broadcast_to(numbers_before(prompts, samples_per_prompt), (count,)), samples_per_prompt)
        share = shown_share(
            sample,
            group_size=samples_per_prompt,
            step=step,
            total_steps=total_steps,
            midpoint=midpoint,
            steepness=steepness,
        )
        key, width = jax.random.fold_in(jax.random.key(0), step), prompts.tokens.shape[1]
        chances = jax.vmap(lambda *where: jax.random.uniform(key_at(key, *where), (width,)))(
            rows.prompt_id, first + sample
        )
        kept = kept_tokens(
            rows.fields["scaffold_tokens"],
            rows.fields["scaffold_length"],
            rows.tokens,
            rows.length,
            share,
            chances,
            separator=ids[0],
        )
        order = jnp.argsort(kept, axis=1, stable=True)  # omitted tokens come first, with the padding
        tokens = jnp.take_along_axis(jnp.where(kept, rows.fields["scaffold_tokens"], pad_id), order, axis=1)
        shown = asked_in_form(rows, tokens, kept.sum(1, dtype=jnp.int32))
        return (Request(shown, 1, first_sample=first + sample),)

    def result(rows: Experience) -> tuple[Experience, dict[str, Array]]:
        learned = as_learned(rows, replayed=False)
        report = {"shown_tokens": (rows.prompt_length - learned.prompt_length).mean()}
        if trained:
            learned = replace(learned, prompt_tokens=rows.prompt_tokens, prompt_length=rows.prompt_length)
        return replace(learned, group=rows.group // samples_per_prompt), report

    return inner._replace(
        requests=requests,
        merge=lambda carry, rows: rows,
        result=result,
        memory=lambda: jnp.int32(1),
        remember=lambda step, rows: step + 1,
        drawn=samples_per_prompt,
        reads=inner.reads | {"scaffold_tokens", "scaffold_length"},
        reports=inner.reports | {"shown_tokens"},
        needs=inner.needs | {"numbered_samples"},
        lacks=inner.lacks | {"any_number"} | (frozenset() if trained else {"own_prompt", "drawn_by_policy"}),
    )


def kept_tokens(
    scaffold: Int[Array, "B P"],
    scaffold_length: Int[Array, "B"],
    prompt: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    share: Float[Array, "B"],
    chances: Float[Array, "B P"],
    *,
    separator: int,
) -> Bool[Array, "B P"]:
    """Which tokens of a scaffold are shown: those of the prompt, and of each criterion all or none.

    Args:
      scaffold, scaffold_length: the prompt with all criteria, left-padded.
      prompt, prompt_length: the prompt itself, left-padded.
      share: of the criteria that is shown in each row.
      chances: uniform random numbers, one for each criterion; those with the smallest are shown.
      separator: the token that ends each criterion.
    """
    width = scaffold.shape[1]
    place = jnp.arange(width) - (width - scaffold_length)[:, None]  # counted from the first real token
    same_place = jnp.clip(place + (width - prompt_length)[:, None], 0, width - 1)
    same = (jnp.take_along_axis(prompt, same_place, axis=1) == scaffold) & (place < prompt_length[:, None])
    start = (place >= 0).sum(1) - ((place >= 0) & (jnp.cumsum((place >= 0) & ~same, axis=1) > 0)).sum(1)
    added = scaffold_length - prompt_length
    inside = (place >= start[:, None]) & (place < (start + added)[:, None])
    ends = inside & (scaffold == separator)
    criterion = jnp.cumsum(ends, axis=1) - ends
    count = ends.sum(1)
    there = jnp.where(jnp.arange(width) < count[:, None], chances, jnp.inf)
    shown = jnp.round(count * share).astype(jnp.int32)
    last = jnp.take_along_axis(jnp.sort(there, axis=1), jnp.maximum(shown - 1, 0)[:, None], axis=1)
    chosen = (there <= last) & (shown > 0)[:, None]
    return (place >= 0) & (~inside | jnp.take_along_axis(chosen, jnp.minimum(criterion, width - 1), axis=1))
