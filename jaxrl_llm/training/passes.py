"""Forward passes of networks over given rows, in the smallest size that holds the rows of a batch.

Batches are padded to the largest allowed length. `at_smallest_size` depends on the actual rows: completions are trimmed
to the smallest of several widths that holds them all, or rows are packed into the smallest of several numbers of bins.
Every size is a branch of one program, so nothing is compiled later, and the results have the shapes and numbers of a
pass over the full width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxrl_llm.experience import Experience
from jaxrl_llm.models.logprobs import Other, TokenStatistics, token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import constrain, shards
from jaxrl_llm.rollout.hidden_states import observed_hidden
from jaxrl_llm.rollout.packed_rows import Bins, best_fit, bins_of, packed_hidden
from jaxrl_llm.terms import Update

# The width of completions in a pass, or the bins that rows are packed into; None is the full width.
Size = Bins | int | None


class Plain(NamedTuple):
    """The sequences to be scored: the rows themselves, or those of a view."""

    prompt_tokens: Array
    prompt_length: Array
    tokens: Array
    length: Array
    support: Array | None = None
    router_choices: Array | None = None


class Scored(NamedTuple):
    """The results of a pass, always in the full width.

    Attributes:
      statistics: statistics of each completion token, [B, T].
      hidden: () -> the state that predicts each completion token, [B, T, D].
      observed: internal quantities of the model for each token of prompt and completion, [B, P + T, ...].
    """

    statistics: TokenStatistics
    hidden: Callable[[], Float[Array, "B T D"]]
    observed: dict[str, Array]


class Compared(NamedTuple):
    """A network whose distributions over the vocabulary are compared with the policy's.

    Attributes:
      model, params: of the network.
      functionals: as in `models.logprobs.Other`.
      says: inputs of its `logits`, [B, T, E]; None: they are computed.
    """

    model: Model
    params: PyTree
    functionals: tuple[Callable, ...]
    says: Array | None = None


def at_smallest_size(update: Update, rows: Experience, function: Callable[[Experience, Size], PyTree]) -> PyTree:
    """`function(rows, size)` at the smallest size of the update that holds the rows.

    Args:
      update: with `packing` or `completion_buckets`; without either the size is None.
      rows: of a batch or a microbatch.
      function: returns arrays of the same shapes for every size.
    """
    branches: list[Callable[[Experience], PyTree]] = []
    needed: Any = 0
    limits: list[int] = []
    count, prompt_width, width = rows.tokens.shape[0], rows.prompt_tokens.shape[1], rows.tokens.shape[1]
    if update.packing:
        lengths = constrain(rows.prompt_length, None), constrain(rows.length, None)
        plan = best_fit(lengths[0] + lengths[1], prompt_width + width)
        needed, limits = plan.used, bin_counts(count, update.packing)

        def packed(number: int) -> Callable[[Experience], PyTree]:
            return lambda rows: function(rows, bins_of(plan, *lengths, prompt_width, width, number))

        branches = [packed(number) for number in limits]
    elif update.completion_buckets:
        needed, limits = rows.length.max(), [w for w in sorted(set(update.completion_buckets)) if w < width]
        branches = [lambda rows, w=w: function(rows, w) for w in limits]
    if not branches:
        return function(rows, None)
    place = (needed > jnp.asarray(limits)).sum()
    return jax.lax.switch(place, [*branches, lambda rows: function(rows, None)], rows)


def bin_counts(rows: int, shares: tuple[float, ...]) -> list[int]:
    """Numbers of bins in ascending order: these shares of the rows, rounded to multiples of the row shards of the mesh.

    >>> bin_counts(10, (0.25, 0.5, 1.0))
    [3, 5]
    """
    part = shards("rows")
    counts = {math.ceil(rows * share / part) * part for share in shares}
    return sorted(number for number in counts if number < rows)


def hidden_of(
    model: Model,
    params: PyTree,
    source: Plain,
    size: Size,
    *,
    router_choices: Array | None = None,
    samples_per_prompt: int = 1,
    names: tuple[str, ...] = (),
) -> tuple[Array, dict[str, Array]]:
    """(hidden states in the layout of the size, internal quantities of every token in the full width).

    The hidden states predict the completion tokens, [B, w, D]; for packed rows they are those of every slot, [N, C, D].
    """
    if isinstance(size, Bins):
        tokens = size.put(jnp.concatenate([source.prompt_tokens, source.tokens], axis=1))
        return packed_hidden(model, params, size, tokens, router_choices=router_choices, names=names)
    width, prompt_width = source.tokens.shape[1], source.prompt_tokens.shape[1]
    cut = width if size is None else size
    routes = None if router_choices is None else router_choices[:, : prompt_width + cut]
    arguments = source.prompt_tokens, source.prompt_length, source.tokens[:, :cut], source.length
    options = {"router_choices": routes, "samples_per_prompt": samples_per_prompt, "names": names}
    hidden, observed = observed_hidden(model, params, *arguments, **options)
    return hidden, {name: _widened(x, prompt_width + width) for name, x in observed.items()}


def in_rows(hidden: Array, source: Plain, size: Size) -> Float[Array, "B T D"]:
    """The hidden states of `hidden_of` that predict each completion token."""
    if isinstance(size, Bins):
        return _predicting(size.taken(hidden), source)
    return _widened(hidden, source.tokens.shape[1])


def scored(
    model: Model,
    params: PyTree,
    source: Plain,
    size: Size = None,
    *,
    temperature: float,
    entropy: bool = False,
    others: tuple[Compared, ...] = (),
    router_choices: Array | None = None,
    samples_per_prompt: int = 1,
    names: tuple[str, ...] = (),
) -> Scored:
    """Statistics of a network for each completion token.

    Args:
      model, params: of the network.
      source: rows.
      size: a size that holds them.
      temperature, entropy: as in `token_statistics`.
      others: networks for comparisons over the vocabulary.
      router_choices: recorded choices for prompt and completion tokens, to be reused.
      samples_per_prompt: number of consecutive rows with the same prompt.
      names: further internal quantities of the model.
    """
    given: dict[str, Any] = {"samples_per_prompt": samples_per_prompt}
    compared = []
    for other, weights, functionals, known in others:
        says = hidden_of(other, weights, source, size, **given)[0] if known is None else _laid_out(known, source, size)
        compared.append(Other(other, weights, jax.lax.stop_gradient(says), functionals))
    hidden, observed = hidden_of(model, params, source, size, **given, router_choices=router_choices, names=names)
    tokens, support = _targets(source, size)
    options = {"temperature": temperature, "entropy": entropy, "others": tuple(compared), "support": support}
    statistics = token_statistics(model, params, hidden, tokens, **options)
    if isinstance(size, Bins):
        statistics = jax.tree.map(lambda x: _predicting(size.taken(x), source), statistics)
    else:
        statistics = jax.tree.map(lambda x: _widened(x, source.tokens.shape[1]), statistics)
    return Scored(statistics, lambda: in_rows(hidden, source, size), observed)


def _targets(source: Plain, size: Size) -> tuple[Array, Array | None]:
    """(the token that each hidden state predicts, its support), in the layout of the size."""
    if not isinstance(size, Bins):
        cut = slice(None, size)
        return source.tokens[:, cut], None if source.support is None else source.support[:, cut]
    # The state of a token predicts the next token; the prediction of the last state is not used.
    following = jnp.pad(jnp.concatenate([source.prompt_tokens, source.tokens], axis=1)[:, 1:], [(0, 0), (0, 1)])
    support = None if source.support is None else _laid_out(source.support, source, size, fill=-1)
    return size.put(following), support


def _laid_out(x: Array, source: Plain, size: Size, fill: int = 0) -> Array:
    """An array of completion tokens, [B, T, E], moved to the positions of the states that predict them."""
    if not isinstance(size, Bins):
        return x[:, :size]
    around = [(0, 0), (source.prompt_tokens.shape[1] - 1, 1), (0, 0)]
    return size.put(jnp.pad(x, around, constant_values=fill), fill=fill)


def _predicting(x: Array, source: Plain) -> Array:
    """From an array of prompt and completion tokens, [B, P + T, ...], the positions that predict completion tokens."""
    first = source.prompt_tokens.shape[1] - 1
    return x[:, first : first + source.tokens.shape[1]]


def _widened(x: Array, width: int) -> Array:
    """[B, w, ...] padded with zeros to the full width."""
    if x.shape[1] == width:
        return x
    return jnp.pad(x, [(0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
