"""Continuations from the end of each step of completions: the share of right answers after each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rollout.plans.plan import (
    Plan,
    Request,
    finished,
    first_requests,
    numbers_before,
    require_inside,
)
from jaxrl_llm.rollout.prefixes import Prefixes
from jaxrl_llm.signatures import call, on_host


@ranged
def continued_steps(
    inner: Plan,
    *,
    choose: Callable[..., Any],
    samples_per_prompt: Count,
    max_turns: Count,
    continuations: Count = 4,
) -> Plan:
    """Two rounds: completions as `inner` draws them, then so many continuations from behind each of their steps.

    Rows of the step are the first completions alone; they know `successes` and `continuations` [B, S]: how many from
    behind each step there were, and how many of these the verifier finds right. `continuation_labels` makes labels of
    them. Nothing is drawn behind the last step: what is counted there is the completion itself, so that a completion
    that is cut off by the limit of length has a last step that leads nowhere. A completion is gone through once for all
    of its continuations, which read its keys and values.

    Args:
      inner: how the completions are drawn.
      choose: names of rows (tokens, length, ...) -> the step that each token belongs to, such as `separated_turns`, or
        a reading of their text, such as `step_borders`. Rows know it as `turn`.
      samples_per_prompt: completions of a prompt, G. A prompt has G * S * K continuations.
      max_turns: S, steps that are continued.
      continuations: K, from behind each step.

    Raises:
      ValueError: for a plan inside whose rows do not come in one round.

    Reference: Math-Shepherd (2312.08935).
    Certainty: verified
    """
    require_inside("continued_steps", inner, "one_round", "equal_groups", "one_group_a_prompt")
    more = samples_per_prompt * max_turns * continuations
    read = on_host(choose)

    def steps(rows: Experience) -> Int[Array, "B T"]:
        return jnp.asarray(rows["turn"] if read else call(choose, rows.known())).astype(jnp.int32)

    class Progress(NamedTuple):
        key: Array
        rows: Experience | None = None
        continued: Experience | None = None

    def requests(memory: Any, carry: Progress | None, prompts: Prompts) -> tuple[Request, ...]:
        if carry is None or carry.rows is None:
            before = numbers_before(prompts, more)
            asked = first_requests(inner, memory, prompts)
            return tuple(request._replace(first_sample=request.first_sample + before) for request in asked)
        rows = carry.rows
        kept = jnp.repeat(step_ends(steps(rows), rows.length, max_turns).ravel(), continuations)
        inside = jnp.arange(rows.tokens.shape[1]) < rows.length[:, None]
        source = jnp.where(inside, jnp.where(rows.source == Source.SAMPLED, Source.HINT, rows.source), Source.PAD)
        prefixes = Prefixes(rows.tokens, kept, source.astype(jnp.int8))
        number = numbers_before(prompts, samples_per_prompt + more) + samples_per_prompt
        return (Request(prompts, more, first_sample=number, prefixes=prefixes),)

    def merge(carry: Progress, rows: Experience) -> Progress:
        if carry.rows is None:
            return carry._replace(rows=finished(inner, rows)[0])
        return carry._replace(continued=rows)

    def result(carry: Progress) -> tuple[Experience, dict[str, Array]]:
        assert carry.rows is not None  # both rounds are over
        assert carry.continued is not None
        rows = carry.rows
        turn = steps(rows)
        ends = step_ends(turn, rows.length, max_turns)
        taken = ends > jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        right = carry.continued["correct"].reshape(*ends.shape, continuations).sum(axis=2)
        drawn = carry.continued.length.reshape(*ends.shape, continuations) - ends[..., None]
        drawn_from = jnp.where(taken, float(continuations), 0.0)
        rows = rows.filled(turn=turn, successes=jnp.where(taken, right, 0.0), continuations=drawn_from)
        return rows, {"continued_tokens": drawn.sum() / ends.shape[0]}

    return inner._replace(
        init=lambda memory, key, prompts, rows: Progress(key),
        requests=requests,
        merge=merge,
        result=result,
        most_rounds=2,
        unrolled=True,
        reads_rewards=True,
        readings=(*inner.readings, *((("turn", choose),) if read else ())),
        provides=inner.provides | {"turn", "successes", "continuations"},
        reports=inner.reports | {"continued_tokens"},
        needs=inner.needs | {"prefixes", "numbered_samples"},
        lacks=inner.lacks | {"one_round"},
    )


def step_ends(turn: Int[Array, "B T"], length: Int[Array, "B"], turns: int) -> Int[Array, "B S"]:
    """Tokens up to the end of each step; the whole completion for steps that were not taken.

    >>> step_ends(jnp.array([[0, 0, 1, 2, 2]]), jnp.array([4]), 4).tolist()
    [[2, 3, 4, 4]]
    """
    inside = jnp.arange(turn.shape[1]) < length[:, None]
    upto = inside[:, None, :] & (turn[:, None, :] <= jnp.arange(turns)[None, :, None])
    return upto.sum(axis=2).astype(jnp.int32)
