"""Written and replayed rows: creating, joining and storing rows that were not sampled in this step.

They are joined after credit, as whole groups at the end of the batch, so they do not affect statistics of rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import FACTS, Experience, KeyUse, Source
from jaxrl_llm.fields import absent_value


@dataclass(frozen=True)
class Written:
    """A source of rows that the caller passes to every step.

    Attributes:
      rows: number of rows.
      rows_per_group: consecutive rows of one group, such as the two of a pair; beside a rollout, its samples per
        prompt.
      provides: further fields of these rows, such as `stored_logprobs` or `preferred`.
      widths: (name, numbers per row or token) of fields with several numbers, such as ratings of attributes.
    """

    rows: int
    rows_per_group: int = 1
    provides: frozenset[str] = frozenset()
    widths: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        if self.rows < 1 or self.rows % self.rows_per_group:
            raise ValueError(
                f"a source has {self.rows} written rows a step, which do not make groups of {self.rows_per_group}; "
                "take a multiple"
            )

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.rows // self.rows_per_group


@dataclass(frozen=True)
class Replay:
    """A source of rows sampled in earlier steps.

    Attributes:
      share: replayed share of the groups of a batch.
      batches: steps whose rows are kept.
      prompts_per_step: groups that a step samples.
      max_prompt_tokens, max_answer_tokens: widths of the stored prompts and reference answers.
      until_step: replayed rows have weight 0 from this step on; None: never.
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
                f"replay.share is {self.share} with training.prompts_per_step {self.prompts_per_step}, which needs "
                f"{self.groups} replayed groups of the {self.batches * self.prompts_per_step} that are kept; change "
                "the share or keep more batches"
            )

    @property
    def groups(self) -> int:
        """Replayed groups per step."""
        return round(self.share / (1 - self.share) * self.prompts_per_step)


@dataclass(frozen=True)
class Hardest:
    """A source of demonstrations for prompts that no sample solved: stored until there are enough, then trained on.

    Attributes:
      rows: demonstrations that are trained on together, a multiple of `rows_per_group`.
      capacity: largest number of stored demonstrations; the oldest are dropped.
      rows_per_group: samples per prompt of the rollout.
      max_prompt_tokens, max_answer_tokens: widths of the stored prompts and reference answers.
    """

    rows: int
    capacity: int
    rows_per_group: int
    max_prompt_tokens: int
    max_answer_tokens: int

    def __post_init__(self):
        if self.rows < 1 or self.rows % self.rows_per_group:
            raise ValueError(
                f"source.hardest.sequences_per_pass is {self.rows}, which rollout.samples_per_prompt "
                f"{self.rows_per_group} does not divide; written rows are grouped in that size, so choose a multiple"
            )
        if self.capacity < self.rows:
            raise ValueError(
                f"source.hardest.capacity is {self.capacity}, less than the {self.rows} demonstrations of "
                "source.hardest.sequences_per_pass; raise it"
            )

    @property
    def groups(self) -> int:
        """Groups that are added to a batch."""
        return self.rows // self.rows_per_group


def empty_rows(rows: int, prompt_width: int, answer_width: int, width: int) -> Experience:
    """Rows of weight 0 of the given widths."""
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
    )


def written_rows(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    prompt_id: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    answer_width: int,
    trained: Float[Array, "B T"] | None = None,
    rows_per_group: int = 1,
    alone: bool = False,
    **fields: Any,
) -> Experience:
    """Given completions as rows of weight 1, with the trained tokens in `written_mask`.

    Args:
      prompt_tokens, prompt_length, prompt_id, tokens, length: as in `Experience`.
      answer_width: width of the (empty) reference answers.
      trained: 1 on tokens to train on; None: all tokens of a completion.
      rows_per_group: consecutive rows of one group.
      alone: the step has no other rows: then `mask` equals `written_mask`. Beside samples `mask` is 0, so that losses
        on samples ignore these rows.
      fields: further fields, one entry per row.
    """
    rows, width = tokens.shape
    inside = jnp.arange(width) < length[:, None]
    learned = inside.astype(jnp.float32) if trained is None else jnp.asarray(trained, jnp.float32) * inside
    number = jnp.arange(rows, dtype=jnp.int32)
    return replace(
        empty_rows(rows, prompt_tokens.shape[1], answer_width, width),
        prompt_tokens=prompt_tokens,
        prompt_length=prompt_length,
        prompt_id=prompt_id,
        tokens=tokens,
        length=length,
        sample=number % rows_per_group,
        group=number // rows_per_group,
        mask=learned if alone else jnp.zeros_like(learned),
        source=jnp.where(inside, Source.DEMONSTRATION, Source.PAD).astype(jnp.int8),
        weight=jnp.ones(rows, jnp.float32),
        fields={**fields, "written_mask": learned},
    )


def demonstrations(batch: Any) -> Experience:
    """Reference completions as the rows of a step; the mask of the batch marks the trained tokens.

    These are all tokens of a completion, end of sequence included, and in a conversation the tokens of the policy.

    Args:
      batch: a `data.SupervisedBatch`.
    """
    rows, width = batch.tokens.shape
    nothing = jnp.zeros((rows, width), jnp.float32)
    return Experience(
        prompt_tokens=jnp.asarray(batch.prompt_tokens),
        prompt_length=jnp.asarray(batch.prompt_length),
        prompt_id=jnp.asarray(batch.prompt_id),
        answer_tokens=jnp.zeros((rows, 1), jnp.int32),
        answer_length=jnp.zeros(rows, jnp.int32),
        sample=jnp.zeros(rows, jnp.int32),
        group=jnp.arange(rows, dtype=jnp.int32),
        weight=jnp.asarray(batch.weight),
        tokens=jnp.asarray(batch.tokens),
        length=jnp.asarray(batch.length),
        source=jnp.asarray(batch.source),
        mask=jnp.asarray(batch.mask),
        behaviour_logprobs=nothing,
        behaviour_entropy=nothing,
        truncated=jnp.zeros(rows, bool),
        fields={"turn": jnp.asarray(batch.turn), "written_mask": jnp.asarray(batch.mask)},
    )


def empty_store(replay: Replay, samples_per_prompt: int, width: int, names: Mapping[str, str]) -> Experience:
    """The empty replay store; every array is a separate buffer, so that it can be donated.

    Args:
      replay: sizes.
      samples_per_prompt: rows of a group.
      width: of completions.
      names: stored fields with their shapes: name -> "row" or "token".
    """
    rows = replay.batches * replay.prompts_per_step * samples_per_prompt
    empty = empty_rows(rows, replay.max_prompt_tokens, replay.max_answer_tokens, width)
    shapes = {"row": (rows,), "token": (rows, width)}
    kept = {name: jnp.zeros(shapes[kind], jnp.float32) for name, kind in names.items()}
    return jax.tree.map(jnp.copy, empty.filled(**kept))


def remembered(store: Experience, batch: Experience, step: Array, replay: Replay) -> Experience:
    """The store with its oldest rows replaced by the rows of this step."""
    rows = store.tokens.shape[0] // replay.batches
    first = (step % replay.batches) * rows
    put = {
        name: jax.lax.dynamic_update_slice_in_dim(old, batch[name][:rows].astype(old.dtype), first, axis=0)
        for name, old in store.known().items()
    }
    return store.filled(**put)


def replayed(store: Experience, key: Array, step: Array, replay: Replay, samples_per_prompt: int) -> Experience:
    """Groups drawn without replacement from the filled part of the store.

    Missing rows, and all rows from `until_step` on, have weight 0.
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


def joined(sampled: Experience, other: Experience, samples_per_prompt: int) -> Experience:
    """Both batches joined, with separate groups. A field that one of them lacks has its absent value there.

    Args:
      sampled: rows of this step, after credit.
      other: rows whose number is a multiple of `samples_per_prompt`.
      samples_per_prompt: rows of a group.
    """
    count, rows = sampled.tokens.shape[0], other.tokens.shape[0]
    group = count // samples_per_prompt + jnp.arange(rows, dtype=jnp.int32) // samples_per_prompt
    other = replace(other, group=group)

    def there(part: Experience, like: Any, name: str) -> Array:
        value = part.get(name)
        if value is None:
            return jnp.full((part.tokens.shape[0], *like.shape[1:]), absent_value(name)).astype(like.dtype)
        return value.astype(like.dtype)

    names = [name for name in (*FACTS, *sorted(sampled.fields.keys() | other.fields.keys())) if name in sampled]
    names += sorted(other.fields.keys() - sampled.fields.keys())
    values = {}
    for name in names:
        like = sampled.get(name) if name in sampled else other[name]
        values[name] = jnp.concatenate([there(sampled, like, name), there(other, like, name)])
    return sampled.filled(**values)


def check_widths(sampled: Experience, written: Experience) -> None:
    """Raise ValueError unless written rows are as wide as sampled ones."""
    for name in ("prompt_tokens", "tokens", "answer_tokens"):
        here, there = sampled[name].shape[1], written[name].shape[1]
        if here != there:
            raise ValueError(
                f"the written rows have {name} of width {there}, the sampled ones of width {here}; write rows with the "
                "rollout.max_prompt_tokens and rollout.max_completion_tokens of the run"
            )


def minibatch_rows(key: Array, epochs: int, cuts: int, groups: Sequence[int], samples: int) -> Array:
    """Row indices [updates, rows]: each epoch visits the groups in a new order, split into minibatches.

    Args:
      key: random key of the step.
      epochs, cuts: number of passes over the batch, and of minibatches in each pass.
      groups: numbers of groups of the parts of a batch, such as sampled and written; each minibatch has an equal share
          of each part.
      samples: rows of a group.
    """
    parts, first = [], 0
    for index, count in enumerate(groups):
        if cuts == 1:
            order = jnp.tile(jnp.arange(count), (epochs, 1))
        else:
            keys = jax.random.split(jax.random.fold_in(key, index) if index else key, epochs)
            order = jax.vmap(lambda k: jax.random.permutation(k, count))(keys)  # noqa: B023
        parts.append((first + order).reshape(epochs * cuts, -1))
        first += count
    rows = jnp.concatenate(parts, axis=1)[..., None] * samples + jnp.arange(samples)
    return rows.reshape(epochs * cuts, -1)
