"""Streaming of completions: the tokens of `generate`, yielded a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.experience import Prompts
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.decoding import Decoding, Drawing, begin, decode, feed
from jaxrl_llm.rollout.sampling import row_keys


class Drawn(NamedTuple):
    """Completions so far, on the host; rows are prompt-major.

    Attributes:
      tokens, logprobs: of each row so far.
      length: tokens of each row so far.
      over: rows that have ended, or are as long as may be.
      truncated: those of them that did not end by themselves.
    """

    tokens: Int[np.ndarray, "B T"]
    logprobs: Float[np.ndarray, "B T"]
    length: Int[np.ndarray, "B"]
    over: Bool[np.ndarray, "B"]
    truncated: Bool[np.ndarray, "B"]


@struct.dataclass
class _Rows:
    """State on the device between two pieces.

    Attributes:
      keys: one a row.
      prompt_length: of each row's prompt.
      state: the rows.
      stopped: rows that ended by themselves.
    """

    keys: Array
    prompt_length: Int[Array, "B"]
    state: Decoding
    stopped: Bool[Array, "B"]


def make_stream(
    model: Model,
    *,
    samples_per_prompt: int,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    controls: Controls | None = None,
) -> Callable[..., Iterator[Drawn]]:
    """Build stream(params, prompts, key, step=0, piece=all), which yields `Drawn` after every `piece` tokens.

    The tokens are those of `generate` with the same arguments. Three programs are compiled for each shape of prompts:
    one prefills, one goes on by any number of tokens and takes the cache of the last call over, one lays parameters
    out; params that went through `model.for_decoding` before are taken as they are.

    Args:
      model, samples_per_prompt, max_completion_tokens, eos_ids, pad_id, temperature, controls: as for `generate`.

    Raises:
      ValueError: for sizes below 1, a temperature below 0, or controls that do not fit.
    """
    for name, value in (("samples_per_prompt", samples_per_prompt), ("max_completion_tokens", max_completion_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if controls is not None:
        controls.check(model.vocabulary_size, max_completion_tokens)

    def drawing(params: PyTree, keys: Array, prompt_length: Int[Array, "B"]) -> Drawing:
        rows = jnp.full(prompt_length.shape, temperature, jnp.float32)
        return Drawing(model, params, keys, rows, prompt_length, controls, tuple(eos_ids))

    @jax.jit
    def start(params: PyTree, prompts: Prompts, key: Array, step: Array) -> _Rows:
        per_row = jax.tree.map(lambda x: jnp.repeat(x, samples_per_prompt, axis=0), prompts)
        rows = per_row.length.shape[0]
        sample = jnp.arange(rows, dtype=jnp.int32) % samples_per_prompt
        keys = row_keys(key, step, per_row.prompt_id, sample)
        state = begin(
            drawing(params, keys, per_row.length),
            prompts,
            per_row,
            None,
            max_completion_tokens=max_completion_tokens,
            slots=max_completion_tokens,  # a piece of n tokens takes n: one for what is pending, n - 1 for its own
            pad_id=pad_id,
        )
        return _Rows(keys, per_row.length, state, jnp.zeros(rows, bool))

    @partial(jax.jit, donate_argnums=1)
    def advanced(params: PyTree, rows: _Rows, piece: Array) -> _Rows:
        draw = drawing(params, rows.keys, rows.prompt_length)
        nothing = jnp.zeros((rows.prompt_length.shape[0], 0), jnp.int32)
        state = feed(draw, rows.state, nothing, jnp.zeros_like(rows.prompt_length), nothing)
        limit = jnp.minimum(state.written.length + piece, max_completion_tokens)
        state, stopped = decode(draw, state, active=~rows.stopped, limit=limit, end_ids=tuple(eos_ids))
        return replace(rows, state=state, stopped=rows.stopped | stopped)

    # Outside of `advanced`, or every piece would lay the parameters out anew.
    laid_out = jax.jit(model.for_decoding or (lambda params: params))

    def stream(
        params: PyTree, prompts: Prompts, key: Array, step: int = 0, piece: int = max_completion_tokens
    ) -> Iterator[Drawn]:
        if piece < 1:
            raise ValueError(f"piece is {piece}; it must be at least 1 token")
        ready = laid_out(params)
        rows, over = start(ready, prompts, key, jnp.int32(step)), np.False_
        while not np.all(over):
            rows = advanced(ready, rows, jnp.int32(min(piece, max_completion_tokens)))
            written = rows.state.written
            tokens, logprobs, length, stopped = jax.device_get(
                (written.tokens, written.logprobs, written.length, rows.stopped)
            )
            over = stopped | (length >= max_completion_tokens)
            yield Drawn(tokens, logprobs, length, over, over & ~stopped)

    return stream
