"""Forward passes of networks over given rows, no larger than the rows of a batch ask for.

A batch is as wide as its longest completion may be. `at_smallest_size` looks at the rows that are there: completions
are trimmed to the smallest of some widths that holds them all, or rows are packed into the smallest of some numbers of
bins. Every size is a branch of one program, so that nothing is compiled later, and what comes out has the shapes of the
whole width, with the numbers of a pass over it.
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

# The completion tokens that a pass looks at, or the bins that it packs rows into; None is the whole width.
Size = Bins | int | None


class Plain(NamedTuple):
    """What is scored of a row: itself, or what a view made of it."""

    prompt_tokens: Array
    prompt_length: Array
    tokens: Array
    length: Array
    support: Array | None = None
    router_choices: Array | None = None


class Scored(NamedTuple):
    """What a pass says, always of the whole width.

    Attributes:
      statistics: of each completion token, [B, T].
      hidden: () -> the state that predicts each completion token, [B, T, D].
      observed: what the model shows of each token of prompt and completion, [B, P + T, ...].
    """

    statistics: TokenStatistics
    hidden: Callable[[], Float[Array, "B T D"]]
    observed: dict[str, Array]


class Compared(NamedTuple):
    """A network whose whole distributions the policy's are compared with.

    Attributes:
      model, params: of the network.
      functionals: as in `models.logprobs.Other`.
      says: states [B, T, E] that its `logits` takes; None has them computed.
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
      function: whatever the size, it returns arrays of the same shapes.
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
    """Numbers of bins, in ascending order: these shares of the rows, each a multiple of what a mesh splits rows into.

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
    """(hidden states as the size lays them out, what the model shows of every token of the whole width).

    They predict the completion tokens [B, w, D]; of packed rows they are those of every slot [N, C, D].
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
    """Hidden states of `hidden_of` as those that predict each completion token."""
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
    """What a network says of each completion token.

    Args:
      model, params: of the network.
      source: rows.
      size: that holds them.
      temperature, entropy: as in `token_statistics`.
      others: networks that whole distributions are compared with.
      router_choices: of prompt and completion tokens, taken again.
      samples_per_prompt: rows that follow one another and have the same prompt.
      names: what else the model shows.
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
    """(the token that each hidden state predicts, what it was drawn from), as the size lays them out."""
    if not isinstance(size, Bins):
        cut = slice(None, size)
        return source.tokens[:, cut], None if source.support is None else source.support[:, cut]
    # The state of a token predicts the next one; that of the last predicts nothing that is read.
    following = jnp.pad(jnp.concatenate([source.prompt_tokens, source.tokens], axis=1)[:, 1:], [(0, 0), (0, 1)])
    support = None if source.support is None else _laid_out(source.support, source, size, fill=-1)
    return size.put(following), support


def _laid_out(x: Array, source: Plain, size: Size, fill: int = 0) -> Array:
    """What belongs to each completion token, [B, T, E], where the state is that predicts it."""
    if not isinstance(size, Bins):
        return x[:, :size]
    around = [(0, 0), (source.prompt_tokens.shape[1] - 1, 1), (0, 0)]
    return size.put(jnp.pad(x, around, constant_values=fill), fill=fill)


def _predicting(x: Array, source: Plain) -> Array:
    """Of what is known of every token of prompt and completion, [B, P + T, ...], that which predicts a completion."""
    first = source.prompt_tokens.shape[1] - 1
    return x[:, first : first + source.tokens.shape[1]]


def _widened(x: Array, width: int) -> Array:
    """[B, w, ...] with zeros up to the whole width."""
    if x.shape[1] == width:
        return x
    return jnp.pad(x, [(0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
