"""Custom models: pure functions that follow the protocol of `Model` are a policy.

The protocol, with B rows, T tokens a row and width D:

    init(key)                                         params: any pytree of floating-point arrays
    apply(params, tokens, positions, cache)           (hidden [B, T, D], the filled cache; None for None)
    logits(params, hidden [..., D])                   float32 [..., V]
    init_cache(rows, slots)                           an empty cache: any pytree of arrays of fixed shapes
    expand_cache(cache, samples, extra_slots)         each row `samples` times, with room for more tokens

and four laws, which `check_model` tries out: a token sees itself and tokens of its row at smaller positions, nothing
else; padding (position -1, before or after the tokens) changes nothing and gives finite hidden states; what goes
through the cache in pieces is what goes through at once; and the order of rows does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxrl_llm.models.generic_cache import recomputing, repeating
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import specs_of

# Sizes at which a model is checked when it is built.
_ROWS, _WIDTH, _SLOTS, _SAMPLES, _EXTRA = 2, 3, 7, 3, 5


def from_functions(
    *,
    init: Callable[[Array], PyTree],
    apply: Callable[..., Any],
    logits: Callable[[PyTree, Array], Array],
    vocabulary_size: int,
    init_cache: Callable[[int, int], PyTree] | None = None,
    expand_cache: Callable[[PyTree, int, int], PyTree] | None = None,
    axes: PyTree | None = None,
    config: Any = None,
) -> Model:
    """A `Model` of pure functions, checked by abstract evaluation: nothing is computed.

    Args:
      init: key -> params.
      apply: (params, tokens, positions, cache) -> (hidden, cache); without `init_cache`,
        (params, tokens, positions) -> hidden.
      logits: (params, hidden) -> float32 scores of the next symbol.
      vocabulary_size: V.
      init_cache: (rows, slots) -> an empty cache. None for a model that has none: each decoding step then computes the
        whole sequence again, which gives the same numbers and takes long (see `recomputing`).
      expand_cache: (cache, samples, extra_slots) -> a cache of `samples` times as many rows, row-major, and that many
        more slots. None repeats rows and adds empty slots along the axes that `cache_axes` finds.
      axes: logical axis names of every parameter, a tuple for each leaf of params; None names none.
      config: what the model was built from, for reports.

    Returns:
      the model; its specs have the shapes and dtypes that `init` gives, and no initialiser of their own.

    Raises:
      ValueError: naming the function that does not keep to the protocol, what it gave, and what it should give.

    >>> def init(key):
    ...     return {"table": jax.random.normal(key, (11, 4))}
    >>> model = from_functions(
    ...     init=init,
    ...     apply=lambda params, tokens, positions: params["table"][tokens],
    ...     logits=lambda params, hidden: hidden @ params["table"].T,
    ...     vocabulary_size=11,
    ... )
    >>> model.specs["table"].shape
    (11, 4)
    """
    if vocabulary_size < 1:
        raise ValueError(f"vocabulary_size is {vocabulary_size}; it must be at least 1")
    if init_cache is None:
        if expand_cache is not None:
            raise ValueError("expand_cache was given without init_cache; give both, or neither for a model without one")
        apply, init_cache = recomputing(apply)
    model = Model(
        init=init,
        apply=apply,
        logits=logits,
        init_cache=init_cache,
        expand_cache=repeating(init_cache) if expand_cache is None else expand_cache,
        specs=specs_of(init, axes),
        vocabulary_size=vocabulary_size,
        config=config,
    )
    check_protocol(model)
    return model


def check_protocol(model: Model) -> None:
    """Check shapes and dtypes of a model's functions against the protocol, by abstract evaluation.

    Raises:
      ValueError: names the function, its result, and the expected result.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"init gives {jax.tree_util.keystr(path)} the dtype {leaf.dtype}; parameters are differentiated and "
                "must be floating-point, so keep constants out of them"
            )
    hidden = _applied(model, params, None, _ROWS, _WIDTH)[0]
    for shape in ((_ROWS, hidden.shape[-1]), hidden.shape):
        scores = jax.eval_shape(model.logits, params, jax.ShapeDtypeStruct(shape, hidden.dtype))
        expected = (*shape[:-1], model.vocabulary_size)
        if not _is_array(scores) or scores.shape != expected or scores.dtype != jnp.float32:
            raise ValueError(
                f"logits gave {_described(scores)} for hidden states {list(shape)}; it must give float32"
                f"{list(expected)}, one score a symbol (vocabulary_size is {model.vocabulary_size}); cast at its end"
            )

    cache = jax.eval_shape(lambda: model.init_cache(_ROWS, _SLOTS))
    for rows in (_ROWS, _ROWS * _SAMPLES):
        for width in (_WIDTH, 1):
            cached = _applied(model, params, cache, rows, width)[0]
            if (cached.shape[-1], cached.dtype) != (hidden.shape[-1], hidden.dtype):
                raise ValueError(
                    f"apply gave hidden states {_described(cached)} with a cache, but {_described(hidden)} without; "
                    "width and dtype must be the same"
                )
        if rows == _ROWS:
            cache = _expanded(model, cache)


def _applied(model: Model, params: PyTree, cache: PyTree, rows: int, width: int) -> tuple[Any, PyTree]:
    """The shapes of what apply gives, checked."""
    ids = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    given = jax.eval_shape(model.apply, params, ids, ids, cache)
    called = f"for tokens {[rows, width]} with {'no cache' if cache is None else 'a cache'}"
    if not isinstance(given, tuple) or len(given) != 2:
        raise ValueError(f"apply gave {_described(given)} {called}; it must give a pair (hidden, cache)")
    hidden, filled = given
    if not _is_array(hidden) or len(hidden.shape) != 3 or hidden.shape[:2] != (rows, width):
        raise ValueError(f"apply gave hidden states {_described(hidden)} {called}; they must be [B, T, D]")
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(f"apply gave hidden states {_described(hidden)} {called}; they must be floating-point")
    if (wanted := jax.tree.structure(cache)) != (got := jax.tree.structure(filled)):
        raise ValueError(
            f"apply gave a cache of the structure {got} {called} of the structure {wanted}; a cache goes in and comes "
            "out with one structure, and None gives None"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(cache), jax.tree.leaves(filled), strict=True)
    for (path, before), after in pairs:
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise ValueError(
                f"apply turned cache{jax.tree_util.keystr(path)} from {_described(before)} into {_described(after)} "
                f"{called}; shapes and dtypes of a cache are fixed: write new tokens into empty slots"
            )
    return hidden, filled


def _expanded(model: Model, cache: PyTree) -> PyTree:
    """The shapes of what expand_cache gives, checked as far as its layout is known.

    It may hang new parts onto a cache (context that samples share); whether apply takes those is seen next.
    """
    expanded = jax.eval_shape(lambda filled: model.expand_cache(filled, _SAMPLES, _EXTRA), cache)
    if type(expanded) is not type(cache):
        raise ValueError(
            f"expand_cache gave {_described(expanded)} for a cache that is {_described(cache)}; it gives such a cache, "
            "with repeated rows and more slots"
        )
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.ndim, str(leaf.dtype)), tree)  # noqa: E731
    if jax.tree.structure(expanded) == jax.tree.structure(cache) and kinds(expanded) != kinds(cache):
        raise ValueError(
            f"expand_cache turned (dimensions, dtype) of the cache from {kinds(cache)} into {kinds(expanded)}; it "
            "repeats rows and adds slots, and leaves dimensions and dtypes as they are"
        )
    return expanded


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def _described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if _is_array(value) else f"a {type(value).__name__}"
