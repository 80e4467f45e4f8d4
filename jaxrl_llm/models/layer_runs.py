"""Runs of layers for a scan: consecutive blocks that are equal, or whose pattern repeats with a period."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxrl_llm.models.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Place:
    """One layer of a period.

    Attributes:
      stack: name of the stack that has its parameters.
      in_stack: its index among the layers of this stack in the period.
      routed: its index among the layers with experts in the period; None for a layer without experts.
      cache: name of its group of caches, see `TransformerConfig.caches`.
      first_cached: index of its cache in this group, in the first period.
      caches: caches of this group in one period; 0 for a layer that reads the cache of another layer.
    """

    stack: str
    in_stack: int
    routed: int | None
    cache: str
    first_cached: int
    caches: int


@dataclass(frozen=True)
class Run:
    """`repeats` consecutive periods of layers.

    Attributes:
      start: index of the first layer.
      repeats: number of periods.
      places: the layers of a period.
      stacks: for each stack of parameters (index of the first layer, layers in a period).
      routed: the same among the layers with experts; None if no layer has experts.
    """

    start: int
    repeats: int
    places: tuple[Place, ...]
    stacks: dict[str, tuple[int, int]]
    routed: tuple[int, int] | None

    @property
    def period(self) -> int:
        """Number of layers in a period."""
        return len(self.places)

    def every(self, values: Sequence[Any]) -> list[list[Any]]:
        """For each layer of the period, its values in all repeats; `values` has one entry per layer of the model."""
        return [list(values[self.start + j :: self.period][: self.repeats]) for j in range(self.period)]

    def cut(self, leaf: Array, layers: tuple[int, int]) -> Array:
        """The part of a stacked leaf that belongs to this run: [repeats, layers in a period, ...]."""
        first, count = layers
        rows = self.repeats * count
        leaf = leaf if (first, rows) == (0, leaf.shape[0]) else leaf[first : first + rows]
        return leaf.reshape(self.repeats, count, *leaf.shape[1:])


def layer_runs(config: TransformerConfig) -> list[Run]:
    """The layers of a model as runs, each of which is one scan."""
    names, routed_from = config.stack_of_layer, 0
    seen = dict.fromkeys(config.stacks, 0)
    cached_in = cache_of_layer(config)
    runs = []
    alike = [(name, cache) for name, (cache, _) in zip(names, cached_in, strict=True)]
    for start, period, repeats in periods(alike):
        places, inside, in_cache = [], dict.fromkeys(seen, 0), [cached_in[start + j][0] for j in range(period)]
        routed = 0
        for j in range(period):
            stack = names[start + j]
            cache, number = cached_in[start + j]
            has_experts = config.experts is not None and stack != "dense_blocks"
            caches = 0 if "reading" in stack else in_cache.count(cache)
            places.append(Place(stack, inside[stack], routed if has_experts else None, cache, number, caches))
            inside[stack] += 1
            routed += has_experts
        stacks = {stack: (seen[stack], count) for stack, count in inside.items() if count}
        runs.append(Run(start, repeats, tuple(places), stacks, (routed_from, routed) if routed else None))
        seen = {stack: first + inside[stack] * repeats for stack, first in seen.items()}
        routed_from += routed * repeats
    return runs


def in_runs(params: PyTree, config: TransformerConfig) -> PyTree:
    """Parameters with the stacked blocks split into the runs of `layer_runs`; several parts are copies."""
    if "runs" in params:
        return params
    runs = tuple(
        {stack: jax.tree.map(partial(run.cut, layers=layers), params[stack]) for stack, layers in run.stacks.items()}
        for run in layer_runs(config)
    )
    return {name: leaf for name, leaf in params.items() if name not in config.stacks} | {"runs": runs}


def cache_of_layer(config: TransformerConfig) -> list[tuple[str, int]]:
    """For each layer the cache that it reads: (name in `TransformerConfig.caches`, index in that group)."""
    places = {layer: (name, i) for name, layers in config.caches.items() for i, layer in enumerate(layers)}
    last = {name: (name, len(layers) - 1) for name, layers in config.caches.items()}
    return [
        places.get(layer) or last[stack.replace("reading_", "")] for layer, stack in enumerate(config.stack_of_layer)
    ]


def periods(names: Sequence[Any]) -> list[tuple[int, int, int]]:
    """(start, period, repeats) of consecutive periodic segments; each is the longest that starts there.

    >>> periods("aaabaaabaa"), periods("aaabbb")
    ([(0, 4, 2), (8, 1, 2)], [(0, 1, 3), (3, 1, 3)])
    """
    found, start = [], 0
    while start < len(names):
        best = (1, 1)
        for period in range(1, (len(names) - start) // 2 + 1):
            repeats = 1
            while all(
                start + repeats * period + j < len(names) and names[start + j] == names[start + repeats * period + j]
                for j in range(period)
            ):
                repeats += 1
            if repeats > 1 and repeats * period > best[0] * best[1]:
                best = (period, repeats)
        found.append((start, *best))
        start += best[0] * best[1]
    return found
