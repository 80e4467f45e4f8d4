"""Completions that are likely to fail are abandoned after some tokens, where that is cheaper than finishing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, KeyUse, Prompts, uniforms_at
from jaxrl_llm.ranges import Count, Natural, PositiveShare, ranged
from jaxrl_llm.rollout.generation import Pause
from jaxrl_llm.rollout.plans.plan import Plan, Request, require_inside
from jaxrl_llm.rollout.rewriting import of_tokens
from jaxrl_llm.signatures import call


@struct.dataclass
class Outcomes:
    """Sums over completions that were looked at and then finished, each with the reciprocal of its chance of that.

    Attributes:
      count: of completions, by (right, looked lost): [2, 2].
      tokens: their lengths, by right: [2].
      right: right ones, unweighted.
      steps: steps so far.
    """

    count: Float[Array, "2 2"]
    tokens: Float[Array, "2"]
    right: Float[Array, ""]
    steps: Int[Array, ""]


@ranged
def early_abort(
    inner: Plan,
    *,
    lost: Callable[..., Bool[Array, "B"]],
    after_tokens: Count,
    spared: PositiveShare = 0.1,
    least_successes: Natural = 50,
) -> Plan:
    """After `after_tokens` tokens every completion is looked at; those that look lost are given up, but for a share.

    The prefix is not computed again: decoding goes on from the same cache, and a completion that goes on is, token by
    token, the one that it would have been. What is given up has weight 0. A row that looks lost and was spared stands
    for those that were not: its weight is 1 / `spared`, so statistics of groups stay unbiased.

    Nothing is given up before `least_successes` right answers were seen, nor while the expected cost of a right answer
    would rise by it (`cost_with_abort` against `cost_without_abort`, with rates counted over all steps so far).

    Args:
      inner: how completions are drawn.
      lost: names of rows as they stand then (tokens, length, behaviour_logprobs, behaviour_entropy, mask, ...) ->
        whether each looks lost.
      after_tokens: tokens behind which they are looked at.
      spared: share of the rows that look lost and go on all the same.
      least_successes: right answers that the rates rest on at least.

    Raises:
      ValueError: for a share outside of (0, 1], or a plan inside of several rounds.

    Reference: when to abort a rollout (2301.10846).
    Certainty: reconstructed
    """
    require_inside("early_abort", inner, "one_round", "any_number", "drawn_by_policy")

    def worth(memory: Outcomes) -> Bool[Array, ""]:
        count, tokens = memory.count, memory.tokens / jnp.maximum(memory.count.sum(1), 1e-9)
        p = count[1].sum() / jnp.maximum(count.sum(), 1e-9)
        rates = count[:, 1] / jnp.maximum(count.sum(1), 1e-9)
        costs = {"share": p, "success": tokens[1], "failure": tokens[0]}
        aborted = cost_with_abort(**costs, look=float(after_tokens), false_alarms=rates[1], true_alarms=rates[0])
        return (memory.right >= least_successes) & (aborted < cost_without_abort(**costs))

    def requests(memory: Outcomes, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        enough = worth(memory)

        key = jax.random.fold_in(jax.random.key(KeyUse.PLAN), memory.steps)

        def goes_on(known: dict[str, Array]) -> Bool[Array, "B"]:
            gone = call(lost, known) & (uniforms_at(key, known["prompt_id"], known["sample"]) >= spared)
            return ~(gone & enough)

        asked, on = inner.requests(memory, carry, prompts), {"abort_on": enough.astype(jnp.float32)}
        pause = Pause(after_tokens, goes_on)
        return tuple(one._replace(pause=pause, fields={**one.fields, **on}) for one in asked)

    def looked_lost(rows: Experience) -> Bool[Array, "B"]:
        """As at the pause: later tokens are not read."""
        seen = jnp.arange(rows.tokens.shape[1]) < after_tokens
        there = {name: value for name, value in rows.known().items() if value.shape == rows.tokens.shape}
        cut = {name: jnp.where(seen, value, 0) for name, value in there.items() if of_tokens(name)}
        known = rows.known() | cut | {"length": jnp.minimum(rows.length, after_tokens)}
        return call(lost, known) & (rows.length > after_tokens)

    def result(carry: Any) -> tuple[Experience, dict[str, Array]]:
        rows, report = inner.result(carry)
        given_up = (rows.weight > 0) & (rows["abandoned"] > 0)
        suspect = looked_lost(rows)
        spare = suspect & (rows["abort_on"] > 0) & ~given_up
        weight = jnp.where(given_up, 0.0, rows.weight * jnp.where(spare, 1.0 / spared, 1.0))
        rows = replace(rows, weight=weight, mask=rows.mask * (weight > 0)[:, None])
        return rows.filled(looked_lost=suspect.astype(jnp.float32)), report | {
            "abandoned_share": given_up.sum() / jnp.maximum((given_up | (weight > 0)).sum(), 1)
        }

    def remember(memory: Outcomes, rows: Experience) -> Outcomes:
        there = rows.weight
        right = rows["correct"] >= 1
        suspect = rows["looked_lost"] > 0
        cell = lambda r, s: (there * (right == r) * (suspect == s)).sum()  # noqa: E731
        count = jnp.stack([jnp.stack([cell(r, s) for s in (False, True)]) for r in (False, True)])
        tokens = jnp.stack([(there * (right == r) * rows.length).sum() for r in (False, True)])
        found = memory.right + (right & (there > 0)).sum().astype(jnp.float32)
        return Outcomes(memory.count + count, memory.tokens + tokens, found, memory.steps + 1)

    return inner._replace(
        requests=requests,
        result=result,
        memory=lambda: Outcomes(jnp.zeros((2, 2)), jnp.zeros(2), jnp.float32(0), jnp.int32(0)),
        remember=remember,
        reports=inner.reports | {"abandoned_share"},
        needs=inner.needs | {"pauses"},
        lacks=inner.lacks | {"one_round"},
    )


@ranged
def mean_entropy_above(
    behaviour_entropy: Float[Array, "B T"], mask: Float[Array, "B T"], *, nats: float
) -> Bool[Array, "B"]:
    """Whether the mean entropy of a row's tokens so far is above a number; such a row looks lost."""
    return (behaviour_entropy * mask).sum(1) > nats * mask.sum(1)


def cost_without_abort(
    share: Float[Array, "..."] | float, success: Float[Array, "..."] | float, failure: Float[Array, "..."] | float
) -> Array:
    """Tokens per right answer if every completion is finished.

        (p t_s + (1 - p) t_f) / p

    Args:
      share: p, of completions that succeed.
      success, failure: tokens of those that do and do not.

    >>> round(float(cost_without_abort(0.25, 100.0, 200.0)), 2), round(float(cost_without_abort(0.9, 100.0, 200.0)), 2)
    (700.0, 122.22)
    """
    p = jnp.asarray(share, jnp.float32)
    return jnp.where(p > 0, (p * success + (1 - p) * failure) / jnp.where(p > 0, p, 1.0), jnp.inf)


def cost_with_abort(
    share: Float[Array, "..."] | float,
    success: Float[Array, "..."] | float,
    failure: Float[Array, "..."] | float,
    look: float,
    false_alarms: Float[Array, "..."] | float,
    true_alarms: Float[Array, "..."] | float,
) -> Array:
    """Tokens per right answer if completions that look lost after `look` tokens are abandoned.

        [p ((1 - fpr) t_s + fpr t_a) + (1 - p) (tpr t_a + (1 - tpr) t_f)] / (p (1 - fpr))

    Args:
      share, success, failure: as for `cost_without_abort`.
      look: t_a.
      false_alarms: fpr, share of the right completions that look lost.
      true_alarms: tpr, share of the others that do.

    >>> round(float(cost_with_abort(0.25, 100.0, 200.0, 60.0, 0.1, 0.8)), 2)
    400.0
    >>> round(float(cost_with_abort(0.9, 100.0, 200.0, 60.0, 0.3, 0.8)), 2)
    139.68
    """
    p, fpr, tpr = (jnp.asarray(x, jnp.float32) for x in (share, false_alarms, true_alarms))
    paid = p * ((1 - fpr) * success + fpr * look) + (1 - p) * (tpr * look + (1 - tpr) * failure)
    found = p * (1 - fpr)
    return jnp.where(found > 0, paid / jnp.where(found > 0, found, 1.0), jnp.inf)
