"""Prompts -> Experience: prefill each prompt once, then decode all samples until each has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.decoding import Decoding, Drawing, Written, begin, cache_stages, decode, feed
from jaxrl_llm.rollout.prefixes import Prefixes, begin_shared, can_share, own_prefix
from jaxrl_llm.rollout.sampling import row_keys


class Pause(NamedTuple):
    """A point at which completions are inspected before they continue, from the same cache.

    Attributes:
      tokens: number of tokens after which they are inspected.
      goes_on: fields of the rows at this point -> whether each row continues.
    """

    tokens: int
    goes_on: Callable[[dict[str, Array]], Bool[Array, "B"]]


def generate(
    model: Model,
    params: PyTree,
    prompts: Prompts,
    key: Array,
    step: Int[Array, "N"] | Array | int,
    *,
    samples_per_prompt: int,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float | Float[Array, "G"] = 1.0,
    prefixes: Prefixes | None = None,
    first_sample: int | Int[Array, "N"] = 0,
    prompt_of: Int[Array, "B"] | None = None,
    active: Bool[Array, "N"] | None = None,
    pause: Pause | None = None,
    limit: Int[Array, "B"] | None = None,
    stop_ids: tuple[int, ...] = (),
    slots: int | None = None,
    record_router: bool = False,
    controls: Controls | None = None,
    record_support: bool = False,
    constrain: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> Experience:
    """Sample completions and record all fields that training needs.

    The prompts are prefilled once and their keys and values are read by all of their samples. Decoding stops as soon as
    every row has ended. The cache is as long as prompt plus completion, so a completion that never ends is cut at
    `max_completion_tokens` and flagged `truncated`. The tokens of a row depend only on its prompt and its sample
    number, not on other rows, on slots, or on the end of its prefix.

    Args:
      model: the policy.
      params: its parameters.
      prompts: N left-padded prompts.
      key: the run's key.
      step: training step, folded into every row's key; one number, or one per prompt.
      samples_per_prompt: G; rows are prompt-major, B = N * G.
      max_completion_tokens: T, end of sequence and prefix included.
      eos_ids: each ends a completion and belongs to it.
      pad_id: fills the rest; may be one of `eos_ids`.
      temperature: of the softmax; 0 is greedy. One number, or one per sample number.
      prefixes: given first tokens of completions, with the policy's log-probabilities and entropies. Sampling continues
        after them as if they had been sampled.
      first_sample: number of the first sample of a prompt, used in the random keys; one number, or one per prompt.
      prompt_of: prompt of each row, in ascending order, for groups of different sizes; then B is its length, and
        `samples_per_prompt` the largest number of samples of a prompt.
      active: prompts to sample; the rows of the others are empty and have weight 0. None samples all.
      pause: a point at which completions are inspected. Rows then have `abandoned`: 1 if they did not continue.
      limit: length at which each completion stops, prefix included; None: `max_completion_tokens` for all.
      stop_ids: tokens after which completions stop; such a row is not `truncated`.
      slots: number of rows decoded at a time; a slot whose row has ended takes the next waiting row. None decodes all
        rows at once.
      controls: changes of the distribution; None samples from the policy's own distribution, as training must. With
        controls the recorded log-probabilities and entropies are those of the changed distribution.
      record_router: record the experts that processed each token, for a mixture of experts.
      record_support: record the candidate tokens of each sampled token; needs `controls.top_k`, which limits their
          number.
      constrain: applied to arrays with one row per sample, to shard them on a mesh.

    Returns:
      `Experience` with all arrays of a rollout. Greedy rows have log-probabilities at temperature 1.

    Raises:
      ValueError: for sizes below 1, a temperature below 0, prefixes that do not fit, controls that do not fit the
        vocabulary, or slots with a model that does not support them.
    """
    count, rows = prompts.tokens.shape[0], prompts.tokens.shape[0] * samples_per_prompt
    rows = rows if prompt_of is None else prompt_of.shape[0]
    _check(model, samples_per_prompt, max_completion_tokens, temperature, slots, prompt_of, record_router)
    _check_rest(model, rows, count if prompt_of is None else 1, max_completion_tokens, slots, pause, controls, prefixes)
    if prompt_of is None:
        number = jnp.repeat(jnp.arange(count, dtype=jnp.int32), samples_per_prompt)
        place = jnp.tile(jnp.arange(samples_per_prompt, dtype=jnp.int32), count)
        per_row = jax.tree.map(lambda x: constrain(jnp.repeat(x, samples_per_prompt, axis=0)), prompts)
    else:
        number = prompt_of.astype(jnp.int32)
        place = jnp.arange(rows, dtype=jnp.int32) - jnp.searchsorted(number, number).astype(jnp.int32)
        per_row = jax.tree.map(lambda x: constrain(x[number]), prompts)
    sample = place + jnp.broadcast_to(jnp.asarray(first_sample, jnp.int32), (count,))[number]
    drawing = Drawing(
        model=model,
        params=params if model.for_decoding is None else model.for_decoding(params),
        keys=row_keys(key, jnp.asarray(step)[number] if jnp.ndim(step) else step, per_row.prompt_id, sample),
        temperature=jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (samples_per_prompt,))[place],
        prompt_length=per_row.length,
        controls=controls,
        eos_ids=tuple(eos_ids),
        record_router=record_router,
        support=_support(model, controls) if record_support else 0,
        some_greedy=not (isinstance(temperature, float | int) and temperature > 0),
    )
    stages = cache_stages(max_completion_tokens) if slots is None and pause is None else ()
    room = stages[0] if stages else 0 if pause is None else max_completion_tokens
    sizes = {"max_completion_tokens": max_completion_tokens, "pad_id": pad_id, "constrain": constrain}
    there = jnp.ones(rows, bool) if active is None else active[number]
    shares = slots is None and prompt_of is None and not isinstance(temperature, Array) and can_share(drawing)
    of_rows = None if prompt_of is None else number
    state, over = _started(drawing, prompts, per_row, of_rows, prefixes, shares=shares, room=room, **sizes)
    most = jnp.full(rows, max_completion_tokens, jnp.int32)
    limit = most if limit is None else jnp.minimum(most, limit)
    slots = None if slots is None else min(slots, rows)
    running, looked_at, ends = there & ~over, {}, (*eos_ids, *stop_ids)
    if pause is not None:
        facts = partial(experience_of, per_row=per_row, sample=sample, group=number)
        state, early, running, gone = _looked_at(drawing, state, pause, running, limit, ends, facts)
        over, looked_at = over | early, {"abandoned": gone.astype(jnp.float32)}
    if model.keep_window is not None and pause is None and slots is None:
        state = replace(state, cache=model.keep_window(state.cache, max_completion_tokens))
    state, stopped = decode(drawing, state, active=running, limit=limit, end_ids=ends, slots=slots, stages=stages)
    ours = experience_of(state.written, per_row, sample=sample, group=number, ended=stopped | over | ~there)
    ours = ours.filled(**looked_at)
    return ours if active is None else replace(ours, weight=there.astype(jnp.float32))


def _started(
    drawing: Drawing,
    prompts: Prompts,
    per_row: Prompts,
    of_rows: Int[Array, "B"] | None,
    prefixes: Prefixes | None,
    *,
    shares: bool,
    room: int,
    **sizes: Any,
) -> tuple[Decoding, Bool[Array, "B"]]:
    """(rows with their prefixes, which of these are already complete)."""
    rows = per_row.length.shape[0]
    if prefixes is None:
        return begin(drawing, prompts, per_row, of_rows, slots=room, **sizes), jnp.zeros(rows, bool)
    prefixes = Prefixes(*map(jnp.asarray, (prefixes.tokens, prefixes.length, prefixes.source)))
    if prefixes.tokens.shape[0] < rows and shares:
        state = begin_shared(drawing, prompts, per_row, prefixes, room=room, **sizes)
    else:
        each = jax.tree.map(lambda x: jnp.repeat(x, rows // x.shape[0], axis=0), prefixes)
        state = begin(drawing, prompts, per_row, of_rows, slots=each.tokens.shape[1] + 1, **sizes)
        state = feed(drawing, state, each.tokens, each.length, each.source)
        state = replace(state, cache=drawing.model.expand_cache(state.cache, 1, room)) if room else state
    last = prefixes.tokens[own_prefix(prefixes), jnp.maximum(prefixes.length - 1, 0)]
    return state, (prefixes.length > 0) & jnp.isin(last, jnp.asarray(drawing.eos_ids, jnp.int32))


def _looked_at(
    drawing: Drawing,
    state: Decoding,
    pause: Pause,
    running: Bool[Array, "B"],
    limit: Int[Array, "B"],
    end_ids: tuple[int, ...],
    facts: Callable[..., Experience],
) -> tuple[Decoding, Bool[Array, "B"], Bool[Array, "B"], Bool[Array, "B"]]:
    """(rows at the pause without pending tokens, which of them have ended, which continue, which are abandoned)."""
    rows = running.shape[0]
    state, ended = decode(drawing, state, active=running, limit=jnp.minimum(limit, pause.tokens), end_ids=end_ids)
    nothing = jnp.zeros((rows, 0), jnp.int32)
    state = feed(drawing, state, nothing, jnp.zeros(rows, jnp.int32), nothing)
    goes_on, under_way = pause.goes_on(facts(state.written, ended=ended).known()), running & ~ended
    return state, ended, under_way & goes_on, under_way & ~goes_on & (state.written.length < limit)


def experience_of(
    written: Written, per_row: Prompts, *, sample: Int[Array, "B"], group: Int[Array, "B"], ended: Bool[Array, "B"]
) -> Experience:
    """The `Experience` of completions."""
    return Experience(
        prompt_tokens=per_row.tokens,
        prompt_length=per_row.length,
        prompt_id=per_row.prompt_id,
        answer_tokens=per_row.answer_tokens,
        answer_length=per_row.answer_length,
        sample=sample,
        group=group,
        weight=jnp.ones(group.shape, jnp.float32),
        tokens=written.tokens,
        length=written.length,
        source=written.source,
        mask=(written.source == Source.SAMPLED).astype(jnp.float32),
        behaviour_logprobs=written.logprobs,
        behaviour_entropy=written.entropy,
        truncated=~ended,
        router_choices=written.routes,
        support=written.support,
        fields=dict(per_row.fields),
    )


def _check(
    model: Model,
    samples_per_prompt: int,
    max_completion_tokens: int,
    temperature: float | Array,
    slots: int | None,
    prompt_of: Array | None,
    record_router: bool,
) -> None:
    if samples_per_prompt < 1 or max_completion_tokens < 1:
        raise ValueError(
            f"rollout.samples_per_prompt is {samples_per_prompt} and rollout.max_completion_tokens is "
            f"{max_completion_tokens}; both must be at least 1"
        )
    if not isinstance(temperature, Tracer) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"rollout.temperature is {temperature}; it must be 0 (greedy) or above")
    if slots is not None and slots < 1:
        raise ValueError(f"rollout.slots is {slots}; it must be at least 1, or None to decode all rows at once")
    if slots is not None and (model.take_rows is None or model.replace_row is None):
        raise ValueError(
            f"rollout.slots is {slots}, but this model does not support replacing rows of its cache (`take_rows` and "
            "`replace_row` of `Model`); give them, or leave slots out"
        )
    if prompt_of is not None and model.take_rows is None:
        raise ValueError(
            "groups of different sizes need a model with `take_rows`; give it, or sample equally many per prompt"
        )
    if record_router and not model.routed:
        raise ValueError("record_router is true, but the model is no mixture of experts; leave it out")


def _support(model: Model, controls: Controls | None) -> int:
    if controls is None or controls.top_k is None:
        raise ValueError("record_support keeps at most top_k tokens; give controls with top_k")
    return min(controls.top_k, model.vocabulary_size)


def _check_rest(
    model: Model,
    rows: int,
    count: int,
    max_completion_tokens: int,
    slots: int | None,
    pause: Pause | None,
    controls: Controls | None,
    prefixes: Prefixes | None,
) -> None:
    if controls is not None:
        controls.check(model.vocabulary_size, max_completion_tokens)
    if prefixes is not None:
        _check_prefixes(prefixes, rows, count, max_completion_tokens)
    if pause is not None and not 0 < pause.tokens < max_completion_tokens:
        raise ValueError(
            f"completions are looked at after {pause.tokens} tokens, but they have 1 to max_completion_tokens "
            f"{max_completion_tokens}; look earlier"
        )
    if pause is not None and slots is not None:
        raise ValueError(
            f"rollout.slots is {slots}, but completions that are looked at before they go on are decoded side by side; "
            "leave slots out"
        )


def _check_prefixes(prefixes: Prefixes, rows: int, count: int, max_completion_tokens: int) -> None:
    given = prefixes.tokens.shape[0]
    if prefixes.length.shape[0] != rows or rows % given or given % count:
        raise ValueError(
            f"prefixes.tokens has {given} rows and prefixes.length {prefixes.length.shape[0]}, but there are {rows} "
            f"completions of {count} prompts; give one of each a completion, or tokens that equally many share"
        )
    if prefixes.tokens.shape[1] > max_completion_tokens:
        raise ValueError(
            f"prefixes.tokens is {prefixes.tokens.shape[1]} tokens wide, more than rollout.max_completion_tokens "
            f"{max_completion_tokens}; shorten them or raise the limit"
        )
