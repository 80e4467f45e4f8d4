"""Completions with a block of parallel threads: they fork at the end of the outlines and join at the end of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.ranges import Count, Natural, ranged
from jaxrl_llm.rollout.plans.plan import (
    Plan,
    Request,
    concatenated,
    finished,
    first_requests,
    numbers_before,
    require_inside,
)
from jaxrl_llm.rollout.prefixes import Prefixes

TAGS = ("~", "'", ":", "#", "_", "&")


@ranged
def parallel_threads(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    max_completion_tokens: Count,
    pad_id: Natural,
    encode: Callable[[str], Sequence[int]],
    branches: Count,
    threads: Count = 2,
    tags: tuple[str, ...] = TAGS,
) -> Plan:
    """Three rounds: text up to the outlines of a block, its threads beside each other, and the rest behind their join.

        ~ '' :   #1 ..._   #2 ..._   &   ...        opening, one mark a thread, begin; thread, its end, twice; close

    A thread stands behind the text before the block and its own number, and sees no other thread; what follows the
    block sees all of them. A trajectory is a row of its whole text, on which the tokens outside of threads are trained,
    and one row of each thread, on which its own are: every drawn token is learned once, behind what it was drawn
    behind, with neither a mask nor positions of a special kind. Rows of threads have weight 0 until `with_threads`
    gives them the advantage of their trajectory, so statistics and metrics are of whole texts.

    Each thread has an equal share of what is left of the completion. A completion has one block at most; one that opens
    none is an ordinary row. The text that begins threads ends any completion for the moment, so it has no other use.

    Args:
      inner: the plain plan of the trajectories.
      samples_per_prompt: rows of a group, trajectories times (1 + `threads`).
      max_completion_tokens: of a whole text.
      pad_id: fills the rest.
      encode: text -> token ids.
      branches: rows of threads of a group: trajectories times `threads`.
      threads: of a block at most; further outlines are not written.
      tags: opening, mark of an outline, begin, thread, end of a thread, close: one token each.

    Raises:
      ValueError: for tags that are not six different tokens, or rows that do not divide.

    Reference: ThreadWeaver (2512.07843).
    Certainty: verified
    """
    require_inside("parallel_threads", inner, "one_round", "equal_groups", "one_group_a_prompt", "any_number")
    block, whole = _block(tags, threads, encode, max_completion_tokens, pad_id), samples_per_prompt - branches
    if branches != whole * threads or inner.samples != whole:
        raise ValueError(
            f"parallel_threads.branches is {branches} of rollout.samples_per_prompt {samples_per_prompt}, but "
            f"{threads} threads of each whole text make groups of a multiple of {1 + threads} rows, of which branches "
            f"are {threads} in {1 + threads}"
        )
    if inner.provides or inner.reads_rewards:
        raise ValueError("rollout.plan.parallel_threads draws the rows itself; leave out the plan inside of it")

    def requests(memory: Any, carry: Forked, prompts: Prompts) -> tuple[Request, ...]:
        before = numbers_before(prompts, whole * (2 + threads))
        if carry.first is None:
            (one,) = first_requests(inner, memory, prompts)
            return (one._replace(first_sample=before, stop_ids=(block.begin,)),)
        if carry.bodies is None:
            prefixes, limit = _thread_starts(block, carry.first)
            asked = Request(prompts, whole * threads, first_sample=before + whole, prefixes=prefixes, limit=limit)
            return (asked._replace(stop_ids=(block.end,)),)
        prefixes, limit = _joined_text(block, carry.first, carry.bodies)
        number = before + whole * (1 + threads)
        return (Request(prompts, whole, first_sample=number, prefixes=prefixes, limit=limit),)

    def merge(carry: Forked, rows: Experience) -> Forked:
        if carry.first is None:
            return carry._replace(first=finished(inner, rows)[0])
        if carry.bodies is None:
            return carry._replace(bodies=rows)
        return carry._replace(joined=rows)

    return inner._replace(
        init=lambda memory, key, prompts, rows: Forked(),
        requests=requests,
        merge=merge,
        result=partial(_texts_and_threads, block),
        samples=samples_per_prompt,
        most_rounds=3,
        unrolled=True,
        provides=inner.provides | {"trajectory", "thread_weight"},
        reports=frozenset({"forked_share"}),
        needs=inner.needs | {"prefixes", "numbered_samples", "pauses"},
        lacks=inner.lacks | {"one_round", "drawn_by_policy"},
    )


class Forked(NamedTuple):
    """The carry: texts up to their block, threads, and whole texts."""

    first: Experience | None = None
    bodies: Experience | None = None
    joined: Experience | None = None


class Block(NamedTuple):
    """How blocks are written.

    Attributes:
      opening, mark, begin, end, close: ids of the tags; `end` is that of a thread.
      labels: what each thread starts with, [threads, 2].
      width: of whole texts.
      pad_id: fills what is shorter.
    """

    opening: int
    mark: int
    begin: int
    end: int
    close: int
    labels: Int[Array, "K 2"]
    width: int
    pad_id: int


def _block(tags: Sequence[str], threads: int, encode: Any, width: int, pad_id: int) -> Block:
    ids = [tuple(encode(tag)) for tag in tags]
    if len(tags) != 6 or any(len(one) != 1 for one in ids) or len(set(ids)) < 6:
        raise ValueError(f"parallel_threads.tags is {tags}; name six different texts of one token each")
    opening, mark, begin, thread, end, close = (one[0] for one in ids)
    labels = jnp.asarray([[thread, *encode(str(number + 1))] for number in range(threads)], jnp.int32)
    return Block(opening, mark, begin, end, close, labels, width, pad_id)


def _outlined(block: Block, rows: Experience) -> Int[Array, "B"]:
    """Number of threads of the block that each row has just opened; 0 for none, or if they have no room."""
    threads, label = block.labels.shape
    place = jnp.arange(rows.tokens.shape[1])
    inside = place < rows.length[:, None]
    at = jnp.max(jnp.where(inside & (rows.tokens == block.opening), place, -1), axis=1)
    last = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.length - 1, 0)[:, None], axis=1)[:, 0]
    marks = (inside & (place > at[:, None]) & (rows.tokens == block.mark)).sum(1)
    count = jnp.minimum(marks, threads)
    return jnp.where(
        (at >= 0) & (last == block.begin) & ~rows.truncated & (_room(block, rows, count) > label), count, 0
    )


def _room(block: Block, rows: Experience, count: Int[Array, "B"]) -> Int[Array, "B"]:
    """Tokens of each thread at most, its label included."""
    return (block.width - 2 - rows.length) // jnp.maximum(count, 1)


def _thread_starts(block: Block, rows: Experience) -> tuple[Prefixes, Int[Array, "B"]]:
    """First tokens of threads, and their largest length."""
    threads, label = block.labels.shape
    count = _outlined(block, rows)
    each = lambda x: jnp.repeat(x, threads, axis=0)  # noqa: E731
    number = jnp.tile(jnp.arange(threads), rows.tokens.shape[0])
    there = number < each(count)
    pieces = [(each(rows.tokens), each(rows.length)), (block.labels[number], jnp.full_like(number, label))]
    tokens, length = pieced(pieces, block.width - 1, block.pad_id)
    length = jnp.where(there, length, 0)
    limit = jnp.where(there, each(rows.length + _room(block, rows, count)), 0)
    return Prefixes(tokens, length, _given(length, block.width - 1)), limit


def _joined_text(block: Block, rows: Experience, bodies: Experience) -> tuple[Prefixes, Int[Array, "B"]]:
    """Whole texts up to the end of their block, and their largest length."""
    width, threads, groups = block.width, block.labels.shape[0], rows.tokens.shape[0]
    count, start = _outlined(block, rows), rows.length  # a body stands behind the text before the block
    said, long = bodies.tokens.reshape(groups, threads, -1), bodies.length.reshape(groups, threads)
    at = jnp.minimum(start[:, None] + jnp.arange(width), width - 1)
    pieces = [(rows.tokens, rows.length)]
    for number in range(threads):
        moved = jnp.take_along_axis(said[:, number], at, axis=1)
        pieces.append((moved, jnp.where(number < count, jnp.maximum(long[:, number] - start, 0), 0)))
    pieces.append((jnp.full((groups, 1), block.close, jnp.int32), jnp.where(count > 0, 1, 0)))
    tokens, length = pieced(pieces, width - 1, block.pad_id)
    length = jnp.where(count > 0, length, 0)
    place = jnp.arange(width - 1)
    source = jnp.where(place < start[:, None], rows.source[:, : width - 1], _given(length, width - 1))
    source = jnp.where(place < length[:, None], source, Source.PAD).astype(jnp.int8)
    return Prefixes(tokens, length, source), jnp.where(count > 0, width, 0)


def _texts_and_threads(block: Block, carry: Forked) -> tuple[Experience, dict[str, Array]]:
    """The trained rows: each whole text, then its threads."""
    assert carry.first is not None  # all rounds are over
    assert carry.bodies is not None
    assert carry.joined is not None
    first, threads = carry.first, block.labels.shape[0]
    count = _outlined(block, first)
    forked = count > 0
    chosen = lambda new, old: jnp.where(forked.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
    texts = jax.tree.map(chosen, carry.joined, first)
    number = jnp.tile(jnp.arange(threads), first.tokens.shape[0])
    there = (number < jnp.repeat(count, threads)).astype(jnp.float32)
    bodies = replace(carry.bodies, weight=jnp.zeros_like(carry.bodies.weight)).filled(thread_weight=there)
    both = concatenated(texts.filled(thread_weight=jnp.zeros(texts.tokens.shape[0])), bodies)
    order = _order(first.tokens.shape[0], threads)
    rows = jax.tree.map(lambda x: x[order], both)
    each = jnp.arange(rows.tokens.shape[0], dtype=jnp.int32)
    return rows.filled(trajectory=each - each % (1 + threads)), {"forked_share": forked.mean()}


def pieced(pieces: Sequence[tuple[Array, Array]], width: int, pad_id: int) -> tuple[Array, Array]:
    """Texts one after the other, each right-padded with a length a row: (tokens, length), cut at a width.

    >>> tokens, length = pieced([(jnp.array([[5, 6]]), jnp.array([1])), (jnp.array([[7, 8]]), jnp.array([2]))], 4, 0)
    >>> tokens.tolist(), length.tolist()
    ([[5, 7, 8, 0]], [3])
    """
    tokens = jnp.concatenate([said for said, _ in pieces], axis=1)
    keep = jnp.concatenate([jnp.arange(said.shape[1]) < length[:, None] for said, length in pieces], axis=1)
    order = jnp.argsort(~keep, axis=1, stable=True)[:, :width]
    length = jnp.minimum(keep.sum(1), width).astype(jnp.int32)
    made = jnp.take_along_axis(tokens, order, axis=1)
    made = jnp.pad(made, ((0, 0), (0, width - made.shape[1])))
    return jnp.where(jnp.arange(width) < length[:, None], made, pad_id), length


def _given(length: Int[Array, "B"], width: int) -> Int[Array, "B F"]:
    return jnp.where(jnp.arange(width) < length[:, None], Source.HINT, Source.PAD).astype(jnp.int8)


def _order(texts: int, threads: int) -> Int[Array, "B"]:
    """Each whole text, then its threads."""
    number = jnp.arange(texts * (1 + threads))
    text, place = number // (1 + threads), number % (1 + threads)
    return jnp.where(place == 0, text, texts + text * threads + place - 1)
