"""Prefixes of completions, and rows that continue a shared prefix from different positions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, PyTree

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.rollout.controls import Watch
from jaxrl_llm.rollout.decoding import Decoding, Drawing
from jaxrl_llm.rollout.partial_completions import Written
from jaxrl_llm.rollout.positions import completion_positions, prompt_positions


@struct.dataclass
class Prefixes:
    """The first tokens of completions: own earlier tokens, a demonstration, a hint.

    Tokens have one row a sample, or fewer: then so many samples that follow one another go on from different places of
    one row, which is gone through once for all of them (where `can_share`; else each goes through its own copy).

    Attributes:
      tokens: right-padded.
      length: how many of them each sample gets; 0 for one that starts afresh.
      source: a `Source` for each of them; what is SAMPLED is trained on.
    """

    tokens: Int[Array, "M F"]
    length: Int[Array, "B"]
    source: Int[Array, "M F"]


def own_prefix(prefixes: Prefixes) -> Int[Array, "B"]:
    """The prefix row that each sample continues."""
    rows = prefixes.length.shape[0]
    return jnp.arange(rows) // (rows // prefixes.tokens.shape[0])


def can_share(drawing: Drawing) -> bool:
    """Whether samples can continue one row of keys and values from different positions."""
    return drawing.model.cut_cache is not None and drawing.controls is None and not drawing.record_router


def begin_shared(
    drawing: Drawing,
    prompts: Prompts,
    per_row: Prompts,
    prefixes: Prefixes,
    *,
    max_completion_tokens: int,
    room: int,
    pad_id: int,
    constrain: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> Decoding:
    """Prefill each prompt once and each prefix once, for all samples that continue it from any position.

    Args:
      drawing: how tokens are drawn, at one temperature.
      prompts: N prompts.
      per_row: the prompt of each of R samples.
      prefixes: M of them, N a divisor of M and M one of R.
      max_completion_tokens: T.
      room: of the cache, for what is drawn.
      pad_id: fills what is not written.
      constrain: places arrays with one entry a sample on a mesh.
    """
    model, params = drawing.model, drawing.params
    (count, width), (given, longest), rows = prompts.tokens.shape, prefixes.tokens.shape, per_row.length.shape[0]
    of_prompt, samples, own = given // count, rows // given, own_prefix(prefixes)
    with jax.named_scope("prefill"):
        positions = prompt_positions(prompts.length, width)
        hidden, cache = model.apply(params, prompts.tokens, positions, model.init_cache(count, width))
        length = prefixes.length.reshape(given, samples).max(axis=1)
        positions = completion_positions(jnp.repeat(prompts.length, of_prompt), length, longest)
        cache = model.expand_cache(cache, of_prompt, longest)
        behind, cache = model.apply(params, prefixes.tokens, positions, cache)
        predicting = jnp.concatenate([jnp.repeat(hidden[:, -1:], of_prompt, axis=0), behind], axis=1)
        scale = jnp.where(drawing.temperature == 0, 1.0, drawing.temperature)[::samples]
        known = token_statistics(model, params, predicting[:, :-1], prefixes.tokens, temperature=scale, entropy=True)
    assert model.cut_cache is not None  # `can_share` has checked this
    cache = model.cut_cache(model.expand_cache(cache, samples, room), drawing.prompt_length + prefixes.length)
    inside = jnp.arange(max_completion_tokens) < prefixes.length[:, None]

    def each(value: Array, fill: float, dtype: type) -> Array:
        wide = jnp.pad(value, ((0, 0), (0, max_completion_tokens - longest)))[own]
        return constrain(jnp.where(inside, wide, fill).astype(dtype))

    assert known.entropy is not None
    written = Written(
        tokens=each(prefixes.tokens, pad_id, jnp.int32),
        logprobs=each(known.logprobs, 0.0, jnp.float32),
        entropy=each(known.entropy, 0.0, jnp.float32),
        source=each(prefixes.source, Source.PAD, jnp.int8),
        length=constrain(prefixes.length.astype(jnp.int32)),
        routes=None,
    )
    watch = Watch.start(None, per_row.tokens, per_row.length, model.vocabulary_size)
    nothing = constrain(jnp.full(rows, -1, jnp.int32))
    return Decoding(written, constrain(predicting[own, prefixes.length]), nothing, cache, watch, jnp.int32(0))
