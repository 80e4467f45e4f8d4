"""The interface of a language model: pure functions over parameters, and a description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree


class Trained(NamedTuple):
    """Which part of the parameters is trained, for a model with frozen parameters (such as one with adapters).

    Attributes:
      split: params -> (trained, frozen); no array is copied.
      join: (trained, frozen) -> params.
      reference: params -> those of the policy before training, which share the frozen arrays.
      merged: params -> plain parameters of the same function, for export.
    """

    split: Callable[[PyTree], tuple[PyTree, PyTree]]
    join: Callable[[PyTree, PyTree], PyTree]
    reference: Callable[[PyTree], PyTree]
    merged: Callable[[PyTree], PyTree]


class Model(NamedTuple):
    """A language model as pure functions over a parameter pytree.

    A position is the index of a token in its own sequence; -1 marks padding, which no token attends to. `apply` is the
    same function with and without a cache.

    Attributes:
      init: key -> params.
      apply: (params, tokens [B, T], positions [B, T], cache or None) -> (hidden [B, T, D], cache or None).
      logits: (params, hidden [..., D]) -> float32 [..., V], before temperature.
      init_cache: (rows, slots) -> an empty cache for `slots` tokens per row.
      expand_cache: (cache, samples, extra_slots) -> `samples` rows for each row, with slots for more tokens.
      specs: a pytree of `ParameterSpec`, the shape of params.
      vocabulary_size: V.
      config: the config that it was built from, for checkpoints and reports.
      observe: `apply` with `names=`, the names of internal arrays to return in a dict as third result: hidden states of
        every block, the chosen experts and their probabilities. A mixture of experts accepts recorded choices in
        `router_choices=`, here and in `apply`. None for a model that does not expose them.
      routed: whether it is a mixture of experts.
      trained: which part of the parameters is trained; None if all of them are.
      for_decoding: params -> the same parameters in a layout that is faster for decoding; None if there is no such
        layout.
      take_rows: (cache, rows [D], extra_slots) -> a cache with these rows, in any order and number. None if it is not
        supported; every prompt then needs the same number of samples.
      replace_row: (cache, slot, source, row) -> the cache of `take_rows(source, ...)` with one row replaced by another
        row of the source. Slots are then reused cyclically (see `Cache`). None if it is not supported; decoding in
        slots is then not available.
      cut_cache: (cache, length [B]) -> the cache after `expand_cache` with only the first `length` tokens of each row,
        so that samples can branch at different positions of a shared prefix. None if it is not supported; each
        sample then computes its own copy of the prefix.
      keep_window: (cache, tokens) -> the cache after `expand_cache` or `take_rows`, for rows that grow by at most
        `tokens` tokens, one at a time and without padding between them; it may drop entries that no later token
        attends to. None if it drops none.
      shared_scoring: whether it is fastest to score and differentiate the samples of a prompt from one forward pass
        over the prompt, through the cache. False for a cache that recomputes, that rounds, or that prevents the use of
        attention kernels.
      packs: whether `apply` and `observe` accept `segments=`, the index [B, T] of the sequence of each token: a row
        then has several sequences, one after another, each with positions from 0 and without attention to the others.
      rules: changes to the run's sharding rules for its arrays (`own_layout`); None for no changes.
    """

    init: Callable[[Array], PyTree]
    apply: Callable[..., tuple[Array, PyTree]]
    logits: Callable[[PyTree, Array], Array]
    init_cache: Callable[[int, int], PyTree]
    expand_cache: Callable[[PyTree, int, int], PyTree]
    specs: PyTree
    vocabulary_size: int
    config: Any
    observe: Callable[..., tuple[Array, PyTree, dict[str, Array]]] | None = None
    routed: bool = False
    trained: Trained | None = None
    for_decoding: Callable[[PyTree], PyTree] | None = None
    take_rows: Callable[[PyTree, Array, int], PyTree] | None = None
    replace_row: Callable[[PyTree, Array, PyTree, Array], PyTree] | None = None
    cut_cache: Callable[[PyTree, Array], PyTree] | None = None
    keep_window: Callable[[PyTree, int], PyTree] | None = None
    shared_scoring: bool = False
    packs: bool = False
    rules: Mapping[str, tuple[str, ...]] | None = None
