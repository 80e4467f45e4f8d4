"""Conversations without the failed turns that a later turn repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array as Key
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, Prompts, Source, uniforms_at
from jaxrl_llm.ranges import Count, Natural, Share, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, finished, first_requests, require_inside
from jaxrl_llm.rollout.rewriting import compacted
from jaxrl_llm.signatures import call


@ranged
def purified(
    inner: Plan, *, failed: Callable[..., Bool[Array, "B S"]], pad_id: Natural, tries: Count = 3, share: Share = 0.7
) -> Plan:
    """A failed turn is replaced by its later repair: the turn, its error and further failed tries are taken out.

    A run of at most `tries` failed turns that a turn which did not fail follows is taken out of the row; where a run is
    longer, or nothing follows, the row stays as it is from there on. What is learned is a conversation without the
    error: its repair stands where the failed turn stood. The repair was drawn with the error in view, so its old
    log-probabilities are computed again. Rewards of turns that are gone are gone; metrics of episodes count them.

    The published method repairs while it samples, which needs no turns of the episode and goes on without the error in
    view; it also keeps the old reasoning where old and new call are much alike. Here whole turns are replaced, behind
    the episode.

    Args:
      inner: how conversations are drawn.
      failed: names of rows (turn_rewards, tokens, turn, source, ...) -> whether each turn failed.
      pad_id: fills what becomes shorter.
      tries: turns that a repair takes at most.
      share: of the rows that are purified, drawn by prompt and sample.

    Raises:
      ValueError: for no tries, a share outside of [0, 1], or a plan inside of several rounds.

    Reference: CLEANER (2601.15141).
    Certainty: reconstructed
    """
    require_inside("purified", inner, "one_round")

    class Held(NamedTuple):
        key: Key
        carry: Any = None

    def requests(memory: Any, held: Held | None, prompts: Prompts) -> tuple[Request, ...]:
        return first_requests(inner, memory, prompts)

    def result(held: Held) -> tuple[Experience, dict[str, Array]]:
        rows, report = held.carry
        chosen = uniforms_at(held.key, rows.prompt_id, rows.sample) < share
        gone = repaired_turns(call(failed, rows.known()), rows["turns"], tries=tries) & chosen[:, None]
        return without_turns(rows, gone, pad_id), report | {"purified_turns": gone.sum() / gone.shape[0]}

    return inner._replace(
        init=lambda memory, key, prompts, rows: Held(key),
        requests=requests,
        merge=lambda held, rows: held._replace(carry=finished(inner, rows)),
        result=result,
        unrolled=True,
        reports=inner.reports | {"purified_turns"},
        needs=inner.needs | {"conversations"},
        lacks=inner.lacks | {"one_round", "drawn_by_policy", "own_prompt"},
    )


def repaired_turns(failed: Bool[Array, "B S"], turns: Int[Array, "B"], *, tries: int) -> Bool[Array, "B S"]:
    """Turns of runs of at most `tries` failed ones that a turn which did not fail follows.

    >>> failed = jnp.array([[True, False, True, True, False, True]])
    >>> repaired_turns(failed, jnp.array([6]), tries=2)[0].tolist()
    [True, False, True, True, False, False]
    >>> repaired_turns(failed, jnp.array([6]), tries=1)[0].tolist()
    [True, False, False, False, False, False]
    """
    count = failed.shape[1]
    place = jnp.arange(count)
    taken = place < turns[:, None]
    fine = taken & ~failed
    # The last turn before, and the first behind each one, that did not fail.
    before = jnp.maximum.accumulate(jnp.where(fine, place, -1), axis=1)
    behind = jnp.minimum.accumulate(jnp.where(fine, place, 2 * count)[:, ::-1], axis=1)[:, ::-1]
    return taken & failed & (behind - before - 1 <= tries)


def without_turns(rows: Experience, gone: Bool[Array, "B S"], pad_id: int) -> Experience:
    """Conversations without some turns and their observations; the remaining turns are renumbered."""
    turn, width = rows["turn"].astype(jnp.int32), gone.shape[1]
    lost = jnp.take_along_axis(gone, jnp.clip(turn, 0, width - 1), axis=1)
    first = jnp.where(gone.any(1), jnp.argmax(gone, axis=1), width)
    source = jnp.where((rows.source == Source.SAMPLED) & (turn >= first[:, None]), Source.REPLAYED, rows.source)
    earlier = jnp.cumsum(gone, axis=1)
    number = turn - jnp.take_along_axis(earlier, jnp.clip(turn, 0, width - 1), axis=1)
    turns = rows["turns"] - gone.sum(1).astype(rows["turns"].dtype)
    order = jnp.argsort(gone, axis=1, stable=True)
    stays = jnp.arange(width) < (width - gone.sum(1))[:, None]
    of_turns = {name: rows[name] for name in ("turn_rewards", "durations") if name in rows}
    of_turns = {name: jnp.where(stays, jnp.take_along_axis(x, order, axis=1), 0.0) for name, x in of_turns.items()}
    moved = rows.filled(turn=number, **of_turns, turns=turns)
    made = compacted(replace(moved, source=source.astype(jnp.int8)), ~lost, pad_id)
    inside = jnp.arange(made.tokens.shape[1]) < made.length[:, None]
    last = jnp.maximum(turns - 1, 0)[:, None]
    return made.filled(turn=jnp.where(inside, made["turn"], last).astype(rows["turn"].dtype))


@ranged
def turns_below(turn_rewards: Float[Array, "B S"], *, reward: float = 0.0) -> Bool[Array, "B S"]:
    """Turns whose own reward is below a number, such as that of a call that failed."""
    return turn_rewards < reward


def turns_answered(
    tokens: Int[Array, "B T"],
    source: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    turn_rewards: Float[Array, "B S"],
    *,
    text: str,
    encode: Callable[[str], Sequence[int]],
) -> Bool[Array, "B S"]:
    """Turns whose observation contains a text, such as that of an error.

    Args:
      tokens, source, turn: of conversations.
      turn_rewards: its width is the number of turns.
      text: the text, compared token by token.
      encode: text -> token ids.

    Raises:
      ValueError: for an empty text.
    """
    ids = tuple(encode(text))
    if not ids:
        raise ValueError("turns_answered.text is empty, which every observation holds; give the text of an error")
    width, turns = tokens.shape[1], turn_rewards.shape[1]
    observed = source == Source.OBSERVATION
    starts = jnp.ones(tokens.shape, bool)
    for offset, token in enumerate(ids):
        at = jnp.minimum(jnp.arange(width) + offset, width - 1)
        starts &= (tokens[:, at] == token) & observed[:, at] & (jnp.arange(width) + offset < width)
    number = jnp.where(starts, turn.astype(jnp.int32), turns)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], turns), bool).at[rows, number].set(True, mode="drop")
