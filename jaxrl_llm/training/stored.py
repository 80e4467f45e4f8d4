"""Rows that were not sampled in this step and learn beside those that were: rehearsed, demonstrated, replayed.

They join after credit, so no reward statistic sees them, as whole groups at the end of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.experience import Experience, KeyUse, Source


@dataclass(frozen=True)
class Replay:
    """Learning again from rows of the last steps.

    Attributes:
      share: of the groups of a batch, those that are replayed.
      batches: steps whose rows are kept.
      prompts_per_step: groups that a step samples.
      max_prompt_tokens, max_answer_tokens: widths of the stored prompts and reference answers.
      until_step: replayed rows have weight 0 from this step on; None never ends.
    """

    share: float
    batches: int
    prompts_per_step: int
    max_prompt_tokens: int
    max_answer_tokens: int
    until_step: int | None = None

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"replay.share is {self.share}; it is the share of a batch and must lie in (0, 1)")
        if self.batches < 1:
            raise ValueError(f"replay.batches is {self.batches}; keep at least 1")
        if not 1 <= self.groups <= self.batches * self.prompts_per_step:
            raise ValueError(
                f"replay.share is {self.share} with training.prompts_per_step {self.prompts_per_step}, which asks for "
                f"{self.groups} replayed groups of the {self.batches * self.prompts_per_step} that are kept; change "
                "the share or keep more batches"
            )

    @property
    def groups(self) -> int:
        """Groups that are replayed in a step."""
        return round(self.share / (1 - self.share) * self.prompts_per_step)


def empty_rows(rows: int, prompt_width: int, answer_width: int, width: int) -> Experience:
    """Rows of weight 0 of the given widths, with rewards and advantages."""
    number, zero = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32)
    per_token = jnp.zeros((rows, width), jnp.float32)
    return Experience(
        prompt_tokens=jnp.zeros((rows, prompt_width), jnp.int32),
        prompt_length=number + 1,
        prompt_id=number,
        answer_tokens=jnp.zeros((rows, answer_width), jnp.int32),
        answer_length=number,
        sample=number,
        group=number,
        weight=zero,
        tokens=jnp.zeros((rows, width), jnp.int32),
        length=number + 1,
        source=jnp.zeros((rows, width), jnp.int8),
        mask=per_token,
        behaviour_logprobs=per_token,
        behaviour_entropy=per_token,
        truncated=jnp.zeros(rows, bool),
        rewards=zero,
        correct=zero,
        advantages=per_token,
    )


def written_rows(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    prompt_id: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    answer_width: int,
    **extras: Array,
) -> Experience:
    """Completions that were written before: source DEMONSTRATION, weight 1, mask 0.

    Losses on samples read the mask and leave them out; losses on written rows read source and weight.
    """
    rows, width = tokens.shape
    inside = jnp.arange(width) < length[:, None]
    return replace(
        empty_rows(rows, prompt_tokens.shape[1], answer_width, width),
        prompt_tokens=prompt_tokens,
        prompt_length=prompt_length,
        prompt_id=prompt_id,
        tokens=tokens,
        length=length,
        source=jnp.where(inside, Source.DEMONSTRATION, Source.PAD).astype(jnp.int8),
        weight=jnp.ones(rows, jnp.float32),
        extras=dict(extras),
    )


def empty_store(replay: Replay, samples_per_prompt: int, width: int) -> Experience:
    """The replay store before the first step; every array is its own buffer."""
    rows = replay.batches * replay.prompts_per_step * samples_per_prompt
    empty = empty_rows(rows, replay.max_prompt_tokens, replay.max_answer_tokens, width)
    return jax.tree.map(jnp.copy, empty)


def remembered(store: Experience, batch: Experience, step: Array, replay: Replay) -> Experience:
    """The store with the rows of this step in the place of the oldest."""
    rows = store.tokens.shape[0] // replay.batches
    first = (step % replay.batches) * rows
    kept = {f.name: getattr(batch, f.name) for f in fields(store) if getattr(store, f.name) is not None}
    return replace(
        store,
        **{
            name: jax.lax.dynamic_update_slice_in_dim(
                getattr(store, name), value[:rows].astype(getattr(store, name).dtype), first, axis=0
            )
            for name, value in kept.items()
            if name != "extras"
        },
    )


def replayed(store: Experience, key: Array, step: Array, replay: Replay, samples_per_prompt: int) -> Experience:
    """Groups of the store, drawn without replacement from those that are filled.

    Rows that are not there, or come after `until_step`, have weight 0.
    """
    groups = store.tokens.shape[0] // samples_per_prompt
    filled = jnp.minimum(step, replay.batches) * replay.prompts_per_step
    number = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, KeyUse.REPLAY), step), groups)
    chosen = number[jnp.argsort(number >= filled, stable=True)[: replay.groups]]
    rows = (chosen[:, None] * samples_per_prompt + jnp.arange(samples_per_prompt)).reshape(-1)
    batch = jax.tree.map(lambda x: x[rows], store)
    there = jnp.repeat(chosen < filled, samples_per_prompt)
    if replay.until_step is not None:
        there &= step < replay.until_step
    source = jnp.where(batch.source == Source.SAMPLED, Source.REPLAYED, batch.source).astype(jnp.int8)
    return replace(batch, weight=jnp.where(there, batch.weight, 0.0), source=source)


def joined(sampled: Experience, stored: Experience, samples_per_prompt: int) -> Experience:
    """Both, with groups of their own. What the stored rows do not know is 0 in them.

    Args:
      sampled: rows of this step, after credit.
      stored: rows whose number is a multiple of `samples_per_prompt`.
      samples_per_prompt: rows of a group.
    """
    rows = stored.tokens.shape[0]
    offset = sampled.tokens.shape[0] // samples_per_prompt
    group: Int[Array, "B"] = offset + jnp.arange(rows, dtype=jnp.int32) // samples_per_prompt
    stored = replace(stored, group=group)

    def both(one: Any, other: Any) -> Array:
        other = jnp.zeros((rows, *one.shape[1:]), one.dtype) if other is None else other
        return jnp.concatenate([one, other.astype(one.dtype)])

    values = {
        f.name: both(getattr(sampled, f.name), getattr(stored, f.name))
        for f in fields(sampled)
        if f.name != "extras" and getattr(sampled, f.name) is not None
    }
    extras = {}
    for name in sampled.extras.keys() | stored.extras.keys():
        one, other = sampled.extras.get(name), stored.extras.get(name)
        if one is None and other is not None:
            one = jnp.zeros((sampled.tokens.shape[0], *other.shape[1:]), other.dtype)
        extras[name] = both(one, other)
    return Experience(**values, extras=extras)


def check_widths(sampled: Experience, stored: Experience) -> None:
    """Raises ValueError unless stored rows are as wide as sampled ones."""
    for name in ("prompt_tokens", "tokens", "answer_tokens"):
        here, there = getattr(sampled, name).shape[1], getattr(stored, name).shape[1]
        if here != there:
            raise ValueError(
                f"the stored rows have {name} of width {there}, the sampled ones of width {here}; store rows with the "
                "rollout.max_prompt_tokens and rollout.max_completion_tokens of the run"
            )


@dataclass(frozen=True)
class StoredRows:
    """What the caller hands to every step beside the prompts (`stored`).

    Attributes:
      groups: how many groups of rows.
      provides: names that these rows alone know, such as `stored_logprobs`.
    """

    groups: int
    provides: frozenset[str] = frozenset()
