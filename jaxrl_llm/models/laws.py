"""The properties that training assumes of a model, tested on a small input."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.models.functions import check_protocol
from jaxrl_llm.models.heads import positions_of
from jaxrl_llm.models.model import Model

# Three prompts, left-padded as a rollout has them; then so many tokens of a completion.
_LENGTHS, _PROMPT, _STEPS, _SAMPLES = (6, 4, 1), 6, 4, 2

LAWS = {
    "finite": "hidden states, scores and gradients are finite, at padding too; check what a row attends to where it "
    "may attend to nothing",
    "causal": "a later token changes nothing before it; mask positions greater than the own one",
    "padding": "a row says the same alone, with padding before and with padding after; positions are those that apply "
    "is given, not places in the array, and -1 is never seen",
    "logits": "scores of a hidden state do not depend on the others that come with it",
    "cache": "a prefill and then one token at a time is the whole sequence at once; write new tokens behind those of "
    "earlier calls, and remember their positions",
    "expand_cache": "sample j of row i continues row i: it is row i * samples + j of the expanded cache; repeat rows "
    "in place (jnp.repeat, not jnp.tile), and fill new slots as an empty cache has them; a cache is expanded again "
    "(with one sample a row) when its room is used up",
    "ended rows": "rows that have ended are given position -1, and change nothing in the others",
}


def check_model(model: Model, params: PyTree | None = None, *, tolerance: float = 1e-4) -> dict[str, float]:
    """Test the laws of a model: cached equals uncached, padding has no effect, no token depends on later ones.

    Args:
      model: to be tested.
      params: its parameters; None draws some. If some are exactly 0 at first (an output projection, say), they hide the
        parts that they multiply: pass others then.
      tolerance: largest error, relative to the largest hidden state; 1e-4 is ample in float32, bfloat16 needs 0.05.

    Returns:
      the largest relative error found for each of `LAWS`.

    Raises:
      ValueError: naming the law that does not hold, and by how much.
    """
    check_protocol(model)
    params = jax.jit(model.init)(jax.random.key(0)) if params is None else params
    apply = jax.jit(model.apply)
    rng = np.random.default_rng(0)
    columns = np.arange(_PROMPT + _STEPS)
    real = columns >= _PROMPT - np.array(_LENGTHS)[:, None]
    positions = np.asarray(positions_of(jnp.asarray(real)))
    tokens = rng.integers(0, model.vocabulary_size, real.shape).astype(np.int32)

    def whole(tokens, positions) -> np.ndarray:
        return np.asarray(apply(params, tokens, positions, None)[0].astype(jnp.float32))

    given = apply(params, tokens, positions, None)[0]
    hidden = np.asarray(given.astype(jnp.float32))
    scale = np.abs(hidden[real]).max()
    errors: dict[str, float] = {}

    def hold(law: str, *pairs) -> None:
        gap = np.max([np.abs(ours - expected).max() for ours, expected in pairs])
        errors[law] = float(gap) / max(float(scale), 1e-30)
        if not errors[law] <= tolerance:
            raise ValueError(
                f"the model breaks the law {law!r} by a relative error of {errors[law]:.2g} (tolerance "
                f"{tolerance:.2g}): {LAWS[law]}"
            )

    _require_finite(model, params, tokens, positions, real)
    errors["finite"] = 0.0

    later = tokens.copy()
    later[:, -_STEPS:] = (later[:, -_STEPS:] + 1) % model.vocabulary_size
    seen = real[:, :-_STEPS]
    hold("causal", (whole(later, positions)[:, :-_STEPS][seen], hidden[:, :-_STEPS][seen]))

    alone, moved = [], []
    for row, length in enumerate(real.sum(axis=1)):
        inside = columns < length
        shifted, other = np.zeros_like(tokens[:1]), tokens[row : row + 1].copy()
        shifted[0, :length] = tokens[row, real[row]]
        other[0, ~real[row]] = (other[0, ~real[row]] + 1) % model.vocabulary_size
        expected = whole(shifted[:, :length], np.arange(length)[None])
        alone.append((hidden[row, real[row]], expected[0]))
        moved.append((whole(shifted, np.where(inside, columns, -1)[None])[0, :length], expected[0]))
        moved.append((whole(other, positions[row : row + 1])[0, real[row]], expected[0]))
    hold("padding", *alone, *moved)

    scores, last = np.asarray(model.logits(params, given)), np.asarray(model.logits(params, given[:, -1]))
    # As large as hidden states, which errors are compared with.
    unit = scale / max(np.abs(scores).max(), 1e-30)
    hold("logits", (last * unit, scores[:, -1] * unit))

    prompt = (params, tokens[:, :_PROMPT], positions[:, :_PROMPT])
    filled = apply(*prompt, model.init_cache(len(_LENGTHS), _PROMPT + _STEPS))
    pieces = [filled[0], *_decoded(apply, params, tokens, positions, filled[1])]
    hold("cache", (np.concatenate(pieces, axis=1)[real], hidden[real]))

    cache = apply(*prompt, model.init_cache(len(_LENGTHS), _PROMPT))[1]
    copies, places = (np.repeat(array, _SAMPLES, axis=0) for array in (tokens, positions))
    # The samples of a prompt differ.
    copies[1::_SAMPLES, _PROMPT:] = (copies[1::_SAMPLES, _PROMPT:] + 1) % model.vocabulary_size
    expected = whole(copies, places)[:, _PROMPT:]
    expanded = model.expand_cache(cache, _SAMPLES, _STEPS)
    continued = np.concatenate(_decoded(apply, params, copies, places, expanded), axis=1)
    half = _STEPS // 2
    grown = _decoded(
        apply,
        params,
        copies,
        places,
        model.expand_cache(cache, _SAMPLES, half),
        lambda full: model.expand_cache(full, 1, half),
    )
    hold("expand_cache", (continued, expected), (np.concatenate(grown, axis=1), expected))

    places[::3, _PROMPT + 1 :] = -1
    continued = np.concatenate(_decoded(apply, params, copies, places, expanded), axis=1)
    going_on = places[:, -1] >= 0
    hold("ended rows", (continued[going_on], expected[going_on]))
    return errors


def _decoded(
    apply: Callable,
    params: PyTree,
    tokens: np.ndarray,
    positions: np.ndarray,
    cache: PyTree,
    grow: Callable[[PyTree], PyTree] = lambda cache: cache,
) -> list:
    """Hidden states after the prompt, one token at a time; half-way the cache grows."""
    pieces = []
    for column in range(_PROMPT, tokens.shape[1]):
        if column == _PROMPT + _STEPS // 2:
            cache = grow(cache)
        one = slice(column, column + 1)
        hidden, cache = apply(params, tokens[:, one], positions[:, one], cache)
        pieces.append(np.asarray(hidden.astype(jnp.float32)))
    return pieces


def _require_finite(model: Model, params: PyTree, tokens: np.ndarray, positions: np.ndarray, real: np.ndarray) -> None:
    def total(params):
        hidden, _ = model.apply(params, tokens, positions, None)
        scores = jax.nn.log_softmax(model.logits(params, hidden))
        counted = jnp.where(real, scores[..., 0], 0.0).sum()
        return counted, (hidden, scores)

    gradients, (hidden, scores) = jax.jit(jax.grad(total, has_aux=True))(params)
    broken = [name for name, value in (("hidden states", hidden), ("scores", scores)) if not _finite(value)]
    named = jax.tree_util.tree_leaves_with_path(gradients)
    broken += [f"the gradient of {jax.tree_util.keystr(path)}" for path, leaf in named if not _finite(leaf)]
    if broken:
        raise ValueError(f"the model breaks the law 'finite' in {', '.join(broken)}: {LAWS['finite']}")


def _finite(value) -> bool:
    return bool(jnp.isfinite(value.astype(jnp.float32)).all())
