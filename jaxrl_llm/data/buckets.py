"""Widths that prompts are padded to: a few, so that prompts of all lengths need few compiled programs."""

from __future__ import annotations

from collections.abc import Sequence

_NARROWEST = 64
# From this width on, midpoints are added: doubling would mean much padding.
_HALVED_FROM = 1024


def buckets(limit: int) -> tuple[int, ...]:
    """Widths up to a limit: powers of two from 64 on, from 1024 on with their midpoints, and the limit itself.

    A width that the limit exceeds by less than a third is left out.

    Raises:
      ValueError: for a limit below 1.

    >>> buckets(3000)
    (64, 128, 256, 512, 1024, 1536, 2048, 3000)
    >>> buckets(48)
    (48,)
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    widths, width = [], _NARROWEST
    while width <= limit:
        widths += [width, width + width // 2] if width >= _HALVED_FROM else [width]
        width *= 2
    return (*(width for width in widths if 4 * width <= 3 * limit), limit)


def bucket_of(length: int, widths: Sequence[int]) -> int:
    """The smallest width that is at least a length.

    Raises:
      ValueError: if all widths are smaller.
    """
    holding = [width for width in widths if width >= length]
    if not holding:
        raise ValueError(f"{length} tokens are more than the largest of the widths {list(widths)}; add a width")
    return min(holding)
