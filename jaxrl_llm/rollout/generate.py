"""Prompts -> Experience: prefill once a prompt, then decode all samples until every one has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.models.logprobs import entropy_of, scaled_log_softmax
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.controls import Controls, Watch, adjusted_scores, truncated
from jaxrl_llm.rollout.sampling import row_keys, sampled_tokens


def prompt_positions(length: Int[Array, "B"], width: int) -> Int[Array, "B P"]:
    """Positions of left-padded prompts: 0, 1, ... on real tokens and -1 on padding."""
    return jnp.maximum(jnp.arange(width) - (width - length[:, None]), -1)


def completion_positions(prompt_length: Int[Array, "B"], length: Int[Array, "B"], width: int) -> Int[Array, "B T"]:
    """Positions of right-padded completions that follow their prompts; -1 on padding."""
    offsets = jnp.arange(width)
    return jnp.where(offsets < length[:, None], prompt_length[:, None] + offsets, -1)


def generate(
    model: Model,
    params: PyTree,
    prompts: Prompts,
    key: Array,
    step: Array | int,
    *,
    samples_per_prompt: int,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float | Float[Array, "G"] = 1.0,
    prefixes: tuple[Int[Array, "G F"], Int[Array, "G"]] | None = None,
    first_sample: int = 0,
    record_router: bool = False,
    controls: Controls | None = None,
    constrain: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> Experience:
    """Sample completions and record everything about them that training needs.

    Decoding stops as soon as every row has ended. The cache is as long as prompt plus completion, so a completion
    that never ends is cut at `max_completion_tokens` and flagged `truncated`.

    Args:
      model: the policy.
      params: its parameters.
      prompts: N left-padded prompts.
      key: the run's key.
      step: training step, folded into every row's key.
      samples_per_prompt: G; rows are prompt-major, B = N * G.
      max_completion_tokens: T, end of sequence included.
      eos_ids: each ends a completion and belongs to it.
      pad_id: fills the rest; may be one of `eos_ids`.
      temperature: of the softmax; 0 is greedy. One number, or one for each sample number.
      prefixes: (tokens, lengths) that the completion of each sample number starts with, shorter than a completion.
        They have source HINT and mask 0.
      first_sample: number of the first sample of a prompt; it addresses the random keys.
      controls: what may be sampled; None samples from the policy's own distribution, as training must. With controls
        the recorded log-probabilities and entropies are those of the distribution that was drawn from.
      record_router: keep the experts that served each token, for a mixture of experts.
      constrain: applied to arrays with one row a sample, to place them on a mesh.

    Returns:
      `Experience` with everything a rollout fills. Greedy rows report log-probabilities at temperature 1.

    Raises:
      ValueError: for sizes below 1, a temperature below 0, or controls that do not fit the vocabulary.
    """
    if samples_per_prompt < 1 or max_completion_tokens < 1:
        raise ValueError(
            f"rollout.samples_per_prompt is {samples_per_prompt} and rollout.max_completion_tokens is "
            f"{max_completion_tokens}; both must be at least 1"
        )
    if not isinstance(temperature, Tracer) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"rollout.temperature is {temperature}; it must be 0 (greedy) or above")
    if controls is not None:
        controls.check(model.vocabulary_size, max_completion_tokens)
    prompt_rows, prompt_width = prompts.tokens.shape
    rows, steps = prompt_rows * samples_per_prompt, max_completion_tokens

    if record_router and not model.routed:
        raise ValueError("record_router is true, but the model is no mixture of experts; leave it out")

    def run(tokens, positions, cache):
        """Hidden states, cache, and the experts of each token [rows, T, L, k] where they are recorded."""
        if not record_router or model.observe is None:
            return *model.apply(params, tokens, positions, cache), None
        hidden, cache, observed = model.observe(params, tokens, positions, cache, names=("router_choices",))
        return hidden, cache, jnp.moveaxis(observed["router_choices"], 0, 2)

    cache = model.init_cache(prompt_rows, prompt_width)
    hidden, cache, routes = run(prompts.tokens, prompt_positions(prompts.length, prompt_width), cache)
    repeat = lambda x: constrain(jnp.repeat(x, samples_per_prompt, axis=0))  # noqa: E731
    cache = model.expand_cache(cache, samples_per_prompt, steps)
    per_prompt = jax.tree.map(repeat, prompts)

    place = jnp.tile(jnp.arange(samples_per_prompt, dtype=jnp.int32), prompt_rows)
    sample = place + first_sample
    keys = row_keys(key, step, per_prompt.prompt_id, sample)
    per_row = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (samples_per_prompt,))[place]
    given, given_length = (
        (jnp.zeros((rows, 1), jnp.int32), jnp.zeros(rows, jnp.int32))
        if prefixes is None
        else (jnp.asarray(part, jnp.int32)[place] for part in prefixes)
    )
    greedy = per_row == 0
    scale = jnp.where(greedy, 1.0, per_row)[:, None]

    watch = Watch.start(controls, per_prompt.tokens, per_prompt.length, model.vocabulary_size)

    def draw(hidden, position, watch):
        scores = model.logits(params, hidden)
        if controls is not None:
            scores = adjusted_scores(scores, controls, watch.seen, position, tuple(eos_ids))
        log_p = scaled_log_softmax(scores, scale)
        if controls is not None:
            log_p = truncated(log_p, controls)
        token = sampled_tokens(log_p, keys, position, greedy)
        if prefixes is not None:
            held = jnp.take(given, jnp.minimum(position, given.shape[1] - 1), axis=1)
            token = jnp.where(position < given_length, held, token)
        return token, jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0], entropy_of(log_p)

    routes = jax.tree.map(lambda x: jnp.pad(repeat(x), ((0, 0), (0, steps), (0, 0), (0, 0))), routes)
    first = draw(repeat(hidden[:, -1]), 0, watch)
    ends = partial(_ends, eos_ids=eos_ids, controls=controls)
    columns, length, ended, routes = _decoded(
        run, draw, ends, first, per_prompt.length, cache, routes, watch, steps, pad_id
    )
    tokens, logprobs, entropy = columns
    inside = jnp.arange(steps) < length[:, None]
    hint = jnp.arange(steps) < given_length[:, None]
    return Experience(
        prompt_tokens=per_prompt.tokens,
        prompt_length=per_prompt.length,
        prompt_id=per_prompt.prompt_id,
        answer_tokens=per_prompt.answer_tokens,
        answer_length=per_prompt.answer_length,
        sample=sample,
        group=jnp.repeat(jnp.arange(prompt_rows, dtype=jnp.int32), samples_per_prompt),
        weight=jnp.ones(rows, jnp.float32),
        tokens=tokens,
        length=length,
        source=jnp.where(hint, Source.HINT, jnp.where(inside, Source.SAMPLED, Source.PAD)).astype(jnp.int8),
        mask=(inside & ~hint).astype(jnp.float32),
        behaviour_logprobs=logprobs,
        behaviour_entropy=entropy,
        truncated=~ended,
        demonstration_tokens=per_prompt.demonstration_tokens,
        demonstration_length=per_prompt.demonstration_length,
        router_choices=routes,
    )


def _ends(token, position, watch: Watch, *, eos_ids: Sequence[int], controls: Controls | None) -> tuple[Array, Watch]:
    """Which rows end with this token, and what is known of the rows after it."""
    ended = jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
    if controls is None:
        return ended, watch
    watch, stopped = watch.after(token, position, controls)
    return ended | stopped, watch


def _decoded(
    run: Callable[[Array, Array, PyTree], tuple[Array, PyTree, Array | None]],
    draw: Callable[[Array, Array | int, Watch], tuple[Array, Array, Array]],
    ends: Callable[[Array, Array | int, Watch], tuple[Array, Watch]],
    first: tuple[Array, Array, Array],
    prompt_length: Int[Array, "B"],
    cache: PyTree,
    routes: Int[Array, "B P+T L k"] | None,
    watch: Watch,
    steps: int,
    pad_id: int,
) -> tuple[tuple[Array, ...], Int[Array, "B"], Bool[Array, "B"], Array | None]:
    """Decode from each row's first token on until every row has ended: (tokens, log-probabilities, entropies), each
    [B, T], the lengths, which rows ended by themselves, and the routes with those of the completions."""
    rows = prompt_length.shape[0]

    def record(columns, values, position):
        return tuple(
            jax.lax.dynamic_update_slice(column, value[:, None].astype(column.dtype), (0, position))
            for column, value in zip(columns, values, strict=True)
        )

    def unfinished(carry):
        position, _, _, ended, *_ = carry
        return (position < steps) & ~jnp.all(ended)

    def decode(carry):
        position, columns, token, ended, length, cache, routes, watch = carry
        at = jnp.where(ended, -1, prompt_length + position - 1)
        hidden, cache, route = run(token[:, None], at[:, None], cache)
        if route is not None:
            routes = jax.lax.dynamic_update_slice(routes, route, (0, routes.shape[1] - steps + position - 1, 0, 0))
        token, logprob, entropy = draw(hidden[:, 0], position, watch)
        values = (
            jnp.where(ended, pad_id, token),
            jnp.where(ended, 0.0, logprob),
            jnp.where(ended, 0.0, entropy),
        )
        length = length + ~ended
        columns = record(columns, values, position)
        now, watch = ends(token, position, watch)
        return position + 1, columns, values[0], ended | now, length, cache, routes, watch

    nothing = jnp.zeros((rows, steps), jnp.float32)
    columns = record((jnp.full((rows, steps), pad_id, jnp.int32), nothing, nothing), first, 0)
    ended, watch = ends(first[0], 0, watch)
    start = (jnp.int32(1), columns, first[0], ended, jnp.ones(rows, jnp.int32), cache, routes, watch)
    _, columns, _, ended, length, _, routes, _ = jax.lax.while_loop(unfinished, decode, start)
    return columns, length, ended, routes
