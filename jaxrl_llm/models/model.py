"""What the rest of the project needs to know of a language model: four pure functions and a description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree


class Trained(NamedTuple):
    """Which part of a model's parameters learns, for a model of which not all does.

    Attributes:
      split: params -> (what learns, what is frozen); no array is copied.
      join: (what learns, what is frozen) -> params.
      reference: params -> those of the policy before anything was learned, which share the frozen arrays.
      merged: params -> plain parameters that compute the same, for export.
    """

    split: Callable[[PyTree], tuple[PyTree, PyTree]]
    join: Callable[[PyTree, PyTree], PyTree]
    reference: Callable[[PyTree], PyTree]
    merged: Callable[[PyTree], PyTree]


class Model(NamedTuple):
    """A language model as pure functions over a parameter pytree.

    A position is the index of a token in its own sequence; -1 marks padding, which attends to nothing real and is
    attended by nothing. Cached and uncached use are the same function.

    Attributes:
      init: key -> params.
      apply: (params, tokens [B, T], positions [B, T], cache or None) -> (hidden [B, T, D], cache or None).
      logits: (params, hidden [..., D]) -> float32 [..., V], before temperature.
      init_cache: (rows, slots) -> an empty cache that holds `slots` tokens a row.
      expand_cache: (cache, samples, extra_slots) -> `samples` rows for each row, with room for more tokens.
      specs: a pytree of `ParameterSpec`, the shape of params.
      vocabulary_size: V.
      config: the description that it was built from, for checkpoints and reports.
      observe: `apply` with `names=` of what else to return, in a dict as third result: hidden states of every block,
        the experts that were chosen and their probabilities. A mixture of experts takes recorded choices back through
        `router_choices=`, here and in `apply`. None for a model that shows nothing.
      routed: whether it is such a mixture.
      trained: which part of the parameters learns; None where all of them do.
      for_decoding: params -> the same for `apply` and `logits`, laid out as many small steps read them best; None where
        that is as they are.
      take_rows: (cache, rows [D], extra_slots) -> a cache that goes on from any choice of rows; None where that is
        not offered, and then every prompt has equally many samples.
      replace_row: (cache, slot, source, row) -> one row of what `take_rows(source, ...)` gave starts anew from another
        row of the source. Slots are used in turn then (see `Cache`). None where that is not offered, and then nothing
        is decoded in slots.
      cut_cache: (cache, length [B]) -> the cache right after `expand_cache` whose rows have seen their first `length`
        tokens alone, so that samples go on from different places of what they share. None where that is not offered,
        and then each goes through its own copy of what it goes on from.
      keep_window: (cache, tokens) -> the cache right after `expand_cache` or `take_rows`, for rows to which `tokens` at
        most are added, one at a time and without padding between them: it may forget what no later token sees. None
        where it forgets nothing.
      shared_scoring: whether the samples of a prompt are scored and differentiated best by going on from one pass over
        it, through the cache. A cache that recomputes, rounds, or keeps attention from its kernels says no.
      packs: whether `apply` and `observe` take `segments=`, the sequence [B, T] that each token of a row belongs to:
        several sequences in a row then, one behind the other, each with positions from 0 and blind to the others.
      rules: changes to the run's table of where its arrays lie on the mesh (`own_layout`); None for none.
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
