"""Rewriting of rows: tokens are kept, removed or prepended, and prompts have another form.

A row holds its tokens and the source of each, so a rewritten row is scored like any other: by the policy, after its own
prompt. The recorded sampling values no longer match it; plans declare this as `own_prompt`.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.fields import FIELDS
from jaxrl_llm.rollout.prefixes import Prefixes


def beginnings(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    source: Int[Array, "B T"],
    behind: Int[Array, "B H"],
    behind_length: Int[Array, "B"],
    pad_id: int,
) -> Prefixes:
    """The first `length` tokens of each row, followed by a hint.

    Args:
      tokens, source: of completions.
      length: how many of them are kept.
      behind: the hint of each row, right-padded.
      behind_length: its tokens; what exceeds the width T - 1 is left out.
      pad_id: fills the rest.
    """
    width = tokens.shape[1] - 1
    place = jnp.arange(width)
    inside = place < length[:, None]
    at = place - length[:, None]
    within = (at >= 0) & (at < behind_length[:, None])
    kept = jnp.where(inside, tokens[:, :width], pad_id)
    origin = jnp.where(inside, source[:, :width], Source.PAD)
    if behind.shape[1]:
        said = jnp.take_along_axis(behind, jnp.clip(at, 0, behind.shape[1] - 1), axis=1)
        kept, origin = jnp.where(within, said, kept), jnp.where(within, Source.HINT, origin)
    total = jnp.minimum(length + behind_length, width)
    return Prefixes(kept, total, origin.astype(jnp.int8))


def compacted(rows: Experience, keep: Bool[Array, "B T"], pad_id: int) -> Experience:
    """Completions with only the kept tokens; later tokens move up, together with their values.

    Fields of shape [B, T] (values per token) move along, others stay.

    Args:
      rows: completions.
      keep: 1 on tokens that stay; nothing behind the end of a row does.
      pad_id: fills the rest.

    >>> from jaxrl_llm.rows import empty_rows
    >>> rows = empty_rows(1, 1, 1, 4).filled(tokens=jnp.array([[5, 6, 7, 8]]), length=jnp.array([4]))
    >>> made = compacted(rows, jnp.array([[True, False, True, True]]), 0)
    >>> made.tokens.tolist(), made.length.tolist()
    ([[5, 7, 8, 0]], [3])
    """
    count, width = rows.tokens.shape
    keep = keep & (jnp.arange(width) < rows.length[:, None])
    order = jnp.argsort(~keep, axis=1, stable=True)
    length = keep.sum(1).astype(jnp.int32)
    inside = jnp.arange(width) < length[:, None]
    fill = {"tokens": pad_id, "source": Source.PAD}

    def moved(name: str, value: Array) -> Array:
        if value.shape != (count, width) or not of_tokens(name):
            return value
        there = jnp.take_along_axis(value, order, axis=1)
        return jnp.where(inside, there, jnp.asarray(fill.get(name, 0), value.dtype))

    return rows.filled(**{name: moved(name, value) for name, value in rows.known().items()} | {"length": length})


def of_tokens(name: str) -> bool:
    """Whether an array of this name has an entry for each token of a completion, if it is as wide."""
    field = FIELDS.get(name)
    return field is None or (field.kind in ("token", "either") and field.provider != "data")


def asked_in_form(prompts: Prompts, tokens: Int[Array, "N P"], length: Int[Array, "N"]) -> Prompts:
    """Prompts in another form, with more or less information; rows sampled from it also hold the form for training.

    See `as_learned`. A form that is a column of the data is that of `form_named`.
    """
    plain = {"plain_tokens": jnp.asarray(prompts.tokens), "plain_length": jnp.asarray(prompts.length)}
    return replace(prompts, tokens=tokens, length=length, fields={**prompts.fields, **plain})


def form_named(prompts: Prompts, view: str) -> tuple[Array, Array]:
    """Tokens and lengths of the form of prompts that a column of the data gives."""
    return prompts.fields[f"{view}_tokens"], prompts.fields[f"{view}_length"]


def as_learned(rows: Experience, *, replayed: bool = True) -> Experience:
    """Rows that were sampled after the form of `asked_in_form`, moved to the plain prompt for training.

    Args:
      rows: which know the plain form; afterwards they do not.
      replayed: their tokens are no longer those that the policy would draw there, and have `Source.REPLAYED`;
        `sampler_gap_mean` leaves those out.
    """
    fields = dict(rows.fields)
    tokens, length = fields.pop("plain_tokens"), fields.pop("plain_length")
    source = jnp.where(rows.source == Source.SAMPLED, Source.REPLAYED, rows.source) if replayed else rows.source
    return replace(rows, prompt_tokens=tokens, prompt_length=length, source=source.astype(jnp.int8), fields=fields)
