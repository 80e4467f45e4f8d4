"""Texts with parallel threads: a reward for a short critical path, and advantages of thread rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import NonNegative, Share, ranged
from jaxrl_llm.statistics import present


@ranged
def accelerated(
    rewards: Float[Array, "B"],
    longest_path: Int[Array, "B"],
    length: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    rate: NonNegative = 0.5,
    most: Share = 0.2,
) -> Float[Array, "B"]:
    """Reward of right answers, larger where the longest path is shorter than the whole text.

        r = 1[right] (1 + rate min(eta, most)),   eta = 1 - longest / total

    Args:
      rewards: of each row; >= 1 is right.
      longest_path: tokens of the longest path through each row (`longest_path`).
      length: tokens of the row.
      weight: of each row; 0 is absent.
      rate: rho.
      most: upper bound of eta.

    Returns:
      The new reward of each row, 0 in absent rows.

    Reference: ThreadWeaver (2512.07843).
    Certainty: verified
    """
    eta = 1.0 - longest_path / jnp.maximum(length, 1)
    return present(jnp.where(rewards >= 1, 1.0 + rate * jnp.clip(eta, 0.0, most), 0.0), weight)


def longest_path(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    encode: Callable[[str], Sequence[int]],
    tags: tuple[str, ...] = ("~", "#", "_", "&"),
) -> Int[Array, "B"]:
    """Tokens of the longest path through each row: all tokens except those of the shorter threads of each block.

    Args:
      tokens, length: of whole texts.
      encode: text -> token ids.
      tags: texts of one token: opening of a block, thread, end of a thread, close of a block.

    Returns:
      One count per row.

    Raises:
      ValueError: for tags that are not four texts of one token.

    Reference: ThreadWeaver (2512.07843).
    Certainty: verified
    """
    ids = [tuple(encode(tag)) for tag in tags]
    if len(ids) != 4 or any(len(one) != 1 for one in ids):
        raise ValueError(f"longest_path.tags is {tags}; give four texts of one token each")
    return inside_threads(tokens, length, [one[0] for one in ids])[1]


def with_threads(
    advantages: Float[Array, "B"],
    weight: Float[Array, "B"],
    trajectory: Int[Array, "B"],
    thread_weight: Float[Array, "B"],
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """(weight, advantages) that include thread rows, each with the advantage of its trajectory.

    Args:
      advantages: of whole texts.
      weight: of each row; thread rows have 0.
      trajectory: row of the whole text that each row belongs to.
      thread_weight: 1 for existing thread rows.

    Reference: ThreadWeaver (2512.07843).
    Certainty: verified
    """
    whole = advantages if advantages.ndim == 1 else advantages[:, 0]
    return jnp.maximum(weight, thread_weight * weight[trajectory]), whole[trajectory]


def inside_threads(
    tokens: Int[Array, "B T"], length: Int[Array, "B"], tags: Sequence[int]
) -> tuple[Bool[Array, "B T"], Int[Array, "B"]]:
    """(mask of tokens inside threads, tokens of the longest path through each row).

    The longest path has all tokens except those of the shorter threads of each block. Block tags inside a thread, and
    ends without a start, are ordinary tokens; an open block ends with the text.

    Args:
      tokens: of whole texts, right-padded.
      length: of each.
      tags: ids of block opening, thread start, thread end and block close.
    """
    opening, thread, end, close = tags

    def step(carry: tuple[Array, ...], token: tuple[Array, Array]) -> tuple[tuple[Array, ...], Array]:
        block, within, now, longest, total = carry
        symbol, there = token
        starts = there & ~within & block & (symbol == thread)
        ends = there & within & (symbol == end)
        body = there & within & ~ends
        now = jnp.where(starts, 0, now + body)
        longest = jnp.maximum(longest, now)
        closes = there & block & ~within & (symbol == close)
        opens = there & ~block & (symbol == opening)
        total = total + (there & ~body) + jnp.where(closes, longest, 0)
        longest, now = jnp.where(closes | opens, 0, longest), jnp.where(closes | ends, 0, now)
        return (block & ~closes | opens, (within | starts) & ~ends, now, longest, total), body

    def row(symbols: Array, count: Array) -> tuple[Array, Array]:
        no, zero = jnp.bool_(False), jnp.int32(0)
        there = jnp.arange(symbols.shape[0]) < count
        (_, _, _, longest, total), body = jax.lax.scan(step, (no, no, zero, zero, zero), (symbols, there))
        return body, total + longest

    return jax.vmap(row)(tokens, length)
