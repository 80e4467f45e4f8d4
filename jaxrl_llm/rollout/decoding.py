"""Decoding in pieces: begin with prompts, feed given tokens, decode until rows stop.

    begin -> [feed] -> decode -> [feed -> decode ...]

Every row has its own length, so rows may start from prefixes of any length and stop at any time. A sampled token is
`pending` until the next call of the model writes it into the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models.logprobs import entropy_of, scaled_log_softmax, token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.controls import Controls, Watch, adjusted_scores, kept_tokens, truncated
from jaxrl_llm.rollout.partial_completions import Written
from jaxrl_llm.rollout.positions import prompt_positions
from jaxrl_llm.rollout.sampling import sampled_tokens
from jaxrl_llm.rollout.slots import DecodingLoop, in_slots, where_rows

# For completions of at least this many tokens the first stage of a cache (see `decode`) is halved, and halved again.
HALVED_FROM = (96, 1024, 2048)


@dataclass(frozen=True)
class Drawing:
    """Settings of sampling: the policy, and settings with one entry per row.

    Attributes:
      model: the policy.
      params: its parameters.
      keys: one random key per row (`row_keys`).
      temperature: [R]; 0 is greedy, which reports log-probabilities at temperature 1.
      prompt_length: [R] real prompt tokens.
      controls: changes of the distribution; None for the policy's own.
      eos_ids: ids that controls treat as ends of sequence.
      record_router: record the experts that processed each token.
      support: S, record up to this number of candidate tokens for each sampled token; 0 records none.
      some_greedy: whether a temperature may be 0; False saves the search for the most likely token.
    """

    model: Model
    params: PyTree
    keys: Array
    temperature: Float[Array, "R"]
    prompt_length: Int[Array, "R"]
    controls: Controls | None
    eos_ids: tuple[int, ...]
    record_router: bool = False
    support: int = 0
    some_greedy: bool = True

    def run(self, tokens: Array, positions: Array, cache: PyTree) -> tuple[Array, PyTree, Array | None]:
        """Hidden states, the filled cache, and the experts of each token [rows, T, L, k] if recorded."""
        if not self.record_router or self.model.observe is None:
            return *self.model.apply(self.params, tokens, positions, cache), None
        names = ("router_choices",)
        hidden, cache, observed = self.model.observe(self.params, tokens, positions, cache, names=names)
        return hidden, cache, jnp.moveaxis(observed["router_choices"], 0, 2)

    def draw(
        self, hidden: Float[Array, "D W"], row: Int[Array, "D"], position: Int[Array, "D"], watch: Watch
    ) -> tuple[Array, ...]:
        """(token, its log-probability, entropy of its distribution, its support if recorded) for some rows."""
        scores = self.model.logits(self.params, hidden)
        if self.controls is not None:
            scores = adjusted_scores(scores, self.controls, watch.seen, position[:, None], self.eos_ids)
        temperature = self.temperature[row]
        greedy = temperature == 0 if self.some_greedy else False
        log_p = scaled_log_softmax(scores, jnp.where(greedy, 1.0, temperature)[:, None])
        if self.controls is not None:
            log_p = truncated(log_p, self.controls)
        token = sampled_tokens(log_p, self.keys[row], position, greedy)
        known = token, jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0], entropy_of(log_p)
        return (*known, kept_tokens(log_p, self.support)) if self.support else known


@struct.dataclass
class Decoding:
    """R rows that are being decoded.

    Attributes:
      written: their tokens so far.
      hidden: hidden state that predicts each row's next token.
      pending: each row's last token if it is not yet in the cache, else -1.
      cache: of the model.
      watch: state of the controls.
      calls: decoding steps so far.
    """

    written: Written
    hidden: Float[Array, "R W"]
    pending: Int[Array, "R"]
    cache: PyTree
    watch: Watch
    calls: Int[Array, ""]


def begin(
    drawing: Drawing,
    prompts: Prompts,
    per_row: Prompts,
    prompt_of: Int[Array, "R"] | None,
    *,
    max_completion_tokens: int,
    slots: int,
    pad_id: int,
    constrain: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> Decoding:
    """Prefill each prompt once, for all of its rows.

    Args:
      drawing: settings of sampling.
      prompts: N prompts.
      per_row: the prompt of each row.
      prompt_of: index of the prompt of each row; None for equally many rows per prompt, in order.
      max_completion_tokens: T.
      slots: slots of the cache after the prompt.
      pad_id: id of padding.
      constrain: shards arrays with one entry per row on a mesh.
    """
    model, (count, width) = drawing.model, prompts.tokens.shape
    rows, samples = per_row.length.shape[0], per_row.length.shape[0] // count
    positions = prompt_positions(prompts.length, width)
    with jax.named_scope("prefill"):
        hidden, cache, routes = drawing.run(prompts.tokens, positions, model.init_cache(count, width))
    if prompt_of is None:
        cache = model.expand_cache(cache, samples, slots)
        repeat = lambda x: constrain(jnp.repeat(x, samples, axis=0))  # noqa: E731
    else:
        assert model.take_rows is not None  # checked by `generate`
        cache, repeat = model.take_rows(cache, prompt_of, slots), lambda x: constrain(x[prompt_of])
    if routes is not None:
        routes = jnp.pad(repeat(routes), ((0, 0), (0, max_completion_tokens), (0, 0), (0, 0)))
    shape = (rows, max_completion_tokens)
    # Two separate arrays: an array that occurs twice in the state of a loop cannot be donated.
    written = Written(
        tokens=constrain(jnp.full(shape, pad_id, jnp.int32)),
        logprobs=constrain(jnp.zeros(shape, jnp.float32)),
        entropy=constrain(jnp.zeros(shape, jnp.float32)),
        source=constrain(jnp.full(shape, Source.PAD, jnp.int8)),
        length=constrain(jnp.zeros(rows, jnp.int32)),
        routes=routes,
        support=constrain(jnp.full((*shape, drawing.support), -1, jnp.int32)) if drawing.support else None,
    )
    watch = Watch.start(drawing.controls, per_row.tokens, per_row.length, model.vocabulary_size)
    nothing = constrain(jnp.full(rows, -1, jnp.int32))
    return Decoding(written, repeat(hidden[:, -1]), nothing, cache, watch, jnp.int32(0))


def feed(
    drawing: Drawing,
    state: Decoding,
    tokens: Int[Array, "R F"],
    length: Int[Array, "R"],
    source: Int[Array, "R F"],
) -> Decoding:
    """Append given tokens to rows; uses F slots of the cache, and one more for the pending token.

    Afterwards no token is pending, so decoding can continue for all rows, including those without given tokens.
    Log-probabilities and entropies of given tokens are those of the policy at the row's temperature, without controls.

    Args:
      drawing: settings of sampling.
      state: rows so far.
      tokens: right-padded; the caller must ensure that they fit into the width T, others are dropped. With F = 0 only
        the pending token is written into the cache.
      length: number of given tokens per row.
      source: their `Source`.
    """
    written, rows = state.written, jnp.arange(tokens.shape[0])
    width = tokens.shape[1]
    given = jnp.arange(width) < length[:, None]
    late = state.pending >= 0
    goes_on = late | (length > 0)
    start = drawing.prompt_length + written.length
    column = jnp.arange(-1, width)
    real = jnp.concatenate([late[:, None], given], axis=1)
    positions = jnp.where(real, start[:, None] + column, -1)
    both = jnp.concatenate([jnp.maximum(state.pending, 0)[:, None], tokens], axis=1)
    hidden, cache, routes = drawing.run(both, positions, state.cache)

    places = jnp.where(real, written.length[:, None] + column, jnp.iinfo(jnp.int32).min)
    written = written.routed(rows, places, routes)
    if width:
        before = jnp.where(late[:, None], hidden[:, 0], state.hidden)
        predicting = jnp.concatenate([before[:, None], hidden[:, 1:-1]], axis=1)
        scale = jnp.where(drawing.temperature == 0, 1.0, drawing.temperature)
        known = token_statistics(drawing.model, drawing.params, predicting, tokens, temperature=scale, entropy=True)
        at = jnp.where(given, written.length[:, None] + jnp.arange(width), written.tokens.shape[1])
        put = lambda into, values: into.at[rows[:, None], at].set(values.astype(into.dtype), mode="drop")  # noqa: E731
        assert known.entropy is not None
        written = replace(
            written,
            tokens=put(written.tokens, tokens),
            logprobs=put(written.logprobs, known.logprobs),
            entropy=put(written.entropy, known.entropy),
            source=put(written.source, source),
            length=written.length + length,
        )
    last = jnp.take_along_axis(hidden, length[:, None, None], axis=1)[:, 0]
    watch = state.watch
    if drawing.controls is not None:
        for i in range(width):
            after, _ = watch.after(tokens[:, i], written.length - length + i, drawing.controls)
            watch = where_rows(given[:, i], after, watch)
    return replace(
        state,
        written=written,
        hidden=jnp.where(goes_on[:, None], last, state.hidden),
        pending=jnp.full_like(state.pending, -1),
        cache=cache,
        watch=watch,
    )


@jax.named_scope("decode")
def decode(
    drawing: Drawing,
    state: Decoding,
    *,
    active: Bool[Array, "R"],
    limit: Int[Array, "R"],
    end_ids: Sequence[int],
    slots: int | None = None,
    stages: Sequence[int] = (),
) -> tuple[Decoding, Bool[Array, "R"]]:
    """Sample tokens until every active row has sampled an end token, or reached its limit.

    Args:
      drawing: settings of sampling.
      state: rows so far; active rows must have no pending token. Without slots, the cache must have room for the
          sampled tokens.
      active: rows to decode.
      limit: largest length of each row, earlier tokens included; at most T.
      end_ids: tokens that end a row; they are part of it.
      slots: number of rows decoded at a time. A slot whose row has ended takes the next waiting row. None decodes all
        rows at once.
      stages: without slots, the cache grows in stages by these numbers of tokens, so that a decoding step does not read
        the full length. The room of the first stage must already exist.

    Returns:
      The state, and which rows ended with an end token. With slots the cache cannot be used afterwards.
    """
    written, rows = state.written, jnp.arange(state.written.length.shape[0])
    active = active & (written.length < limit)
    ends = jnp.asarray(list(end_ids), jnp.int32)

    def ended(token, position, watch):
        over = jnp.isin(token, ends) if end_ids else jnp.zeros(token.shape, bool)
        if drawing.controls is None:
            return over, watch
        watch, stopped = watch.after(token, position, drawing.controls)
        return over | stopped, watch

    def first(part):
        hidden, row, position, watch = part
        drawn = drawing.draw(hidden, row, position, watch)
        return drawn, *ended(drawn[0], position, watch)

    start = (state.hidden, rows, written.length, state.watch)
    drawn, over, watch = (
        first(start)
        if slots is None
        else jax.lax.map(
            lambda one: jax.tree.map(lambda x: x[0], first(jax.tree.map(lambda x: x[None], one))),
            start,
            batch_size=slots,
        )
    )
    written = written.appended(rows, active, drawn)
    stopped = active & over
    running = active & ~over & (written.length < limit)

    def advanced(loop: DecodingLoop) -> DecodingLoop:
        position = loop.written.length[loop.row]
        at = jnp.where(loop.running, drawing.prompt_length[loop.row] + position - 1, -1)
        hidden, cache, route = drawing.run(loop.token[:, None], at[:, None], loop.cache)
        place = jnp.where(loop.running, position - 1, jnp.iinfo(jnp.int32).min)
        written = loop.written.routed(loop.row, place[:, None], route)
        drawn = drawing.draw(hidden[:, 0], loop.row, position, loop.watch)
        over, watch = ended(drawn[0], position, loop.watch)
        over = over & loop.running
        return replace(
            loop,
            token=jnp.where(loop.running, drawn[0], loop.token),
            running=loop.running & ~over & (position + 1 < limit[loop.row]),
            stopped=loop.stopped.at[loop.row].max(over),
            written=written.appended(loop.row, loop.running, drawn),
            cache=cache,
            watch=where_rows(loop.running, watch, loop.watch),
            calls=loop.calls + 1,
        )

    token = jnp.where(active, drawn[0], jnp.maximum(state.pending, 0))
    watch = where_rows(active, watch, state.watch)
    loop = DecodingLoop(rows, token, running, stopped, written, state.cache, watch, state.calls)
    if slots is None:
        full = loop.calls
        for room, following in itertools.pairwise(stages):
            full = full + room
            loop = jax.lax.while_loop(
                lambda loop, full=full: jnp.any(loop.running) & (loop.calls < full), advanced, loop
            )
            loop = replace(loop, cache=drawing.model.expand_cache(loop.cache, 1, following))
        loop = jax.lax.while_loop(lambda loop: jnp.any(loop.running), advanced, loop)
        pending = jnp.where(active, loop.token, state.pending)
        return replace(
            state, written=loop.written, pending=pending, cache=loop.cache, watch=loop.watch, calls=loop.calls
        ), loop.stopped
    loop = in_slots(drawing.model, loop, advanced, slots)
    return replace(state, written=loop.written, cache=None, calls=loop.calls), loop.stopped


def cache_stages(tokens: int) -> tuple[int, ...]:
    """Stages of the cache for `tokens` sampled tokens; each stage is a loop, so short completions have few stages."""
    halvings = sum(tokens >= least for least in HALVED_FROM)
    sizes = [tokens]
    for _ in range(halvings):
        sizes[:1] = [sizes[0] - sizes[0] // 2, sizes[0] // 2]
    return tuple(sizes)
