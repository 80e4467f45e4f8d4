"""Two rounds: completions, then further completions of the same prompts whose beginnings are made from the first.

Plans with branches, retries, guidance or demonstration prefixes declare the beginnings of the further rows (`begin`)
and the final rows (`finish`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.rollout.plans.plan import (
    Plan,
    Request,
    concatenated,
    finished,
    first_requests,
    numbers_before,
    require_inside,
)
from jaxrl_llm.rollout.prefixes import Prefixes


class Given(NamedTuple):
    """Inputs of the further rows.

    Attributes:
      rows: the first completions, grouped by prompt.
      prompts: N prompts of the step.
      key: random key of the step's plan.
      step: updates so far.
    """

    rows: Experience
    prompts: Prompts
    key: Array
    step: Array


class Beginning(NamedTuple):
    """Beginnings of the further completions.

    Attributes:
      prompts: N, in the form for the further rows.
      prefixes: one row per completion; None starts with the prompt alone.
      active: prompts that get further rows; the others' have weight 0. None: all.
    """

    prompts: Prompts
    prefixes: Prefixes | None = None
    active: Bool[Array, "N"] | None = None


class Progress(NamedTuple):
    """The carry: rows and state so far."""

    key: Array
    step: Array
    rows: Experience | None = None
    more: Experience | None = None


def unchanged(given: Given, more: Experience) -> tuple[Experience, Experience]:
    """The rows of both rounds, unchanged."""
    return given.rows, more


def further(
    inner: Plan,
    *,
    name: str,
    branches: int,
    samples_per_prompt: int,
    begin: Callable[[Given], Beginning],
    finish: Callable[[Given, Experience], tuple[Experience, Experience]] = unchanged,
    report: Callable[[Experience], dict[str, Array]] = lambda rows: {},
    counts_steps: bool = False,
    **facts: Any,
) -> Plan:
    """The plan of two rounds. Rows know `branch`: 1 for the further ones.

    Args:
      inner: how the first completions are sampled, `samples_per_prompt - branches` a prompt.
      name: of the plan, for messages.
      branches: further rows of each prompt.
      samples_per_prompt: rows of a group in the end.
      begin: what they start from.
      finish: (what was given, further rows) -> the first and the further rows that learn.
      report: rows -> numbers to report by name; its keys are those of `facts["reports"]`.
      counts_steps: `begin` or `finish` reads the step.
      facts: further attributes of the plan.

    Raises:
      ValueError: for no further rows, or a plan inside that does not leave them room.
    """
    drawn = samples_per_prompt - branches
    _check(inner, name, samples_per_prompt, branches)

    def given(carry: Progress, prompts: Prompts) -> Given:
        assert carry.rows is not None
        return Given(carry.rows, prompts, carry.key, carry.step)

    def requests(memory: Any, carry: Progress | None, prompts: Prompts) -> tuple[Request, ...]:
        if carry is None or carry.rows is None:
            before = numbers_before(prompts, branches)
            asked = first_requests(inner, memory, prompts)
            return tuple(request._replace(first_sample=request.first_sample + before) for request in asked)
        start = begin(given(carry, prompts))
        number = numbers_before(prompts, samples_per_prompt) + drawn
        asked = Request(start.prompts, branches, first_sample=number, prefixes=start.prefixes, active=start.active)
        return (asked,)

    def merge(carry: Progress, rows: Experience) -> Progress:
        if carry.rows is None:
            return carry._replace(rows=finished(inner, rows)[0])
        return carry._replace(more=rows)

    def result(carry: Progress) -> tuple[Experience, dict[str, Array]]:
        assert carry.rows is not None  # both rounds are over
        assert carry.more is not None
        first, more = finish(given(carry, prompts_of(carry.rows, drawn)), carry.more)
        first = first.filled(branch=jnp.zeros(first.tokens.shape[0], jnp.float32))
        both = concatenated(first, more.filled(branch=jnp.ones(more.tokens.shape[0], jnp.float32)))
        order = _group_order(more.tokens.shape[0] // branches, drawn, branches)
        rows = jax.tree.map(lambda x: x[order], both)
        return rows, report(rows)

    def init(memory: Any, key: Array, prompts: Prompts, rows: Experience) -> Progress:
        return Progress(key, memory if counts_steps else jnp.int32(0))

    remembered: dict[str, Any] = {}
    if counts_steps:
        remembered = {"memory": lambda: jnp.int32(0), "remember": lambda memory, rows: memory + 1}
    for attribute in ("needs", "lacks", "provides", "reads"):
        facts[attribute] = getattr(inner, attribute) | frozenset(facts.get(attribute, ()))
    facts["reads_rewards"] = inner.reads_rewards or facts.get("reads_rewards", False)
    return inner._replace(
        init=init,
        requests=requests,
        merge=merge,
        result=result,
        samples=samples_per_prompt,
        most_rounds=2,
        unrolled=True,
        **remembered,
        **facts
        | {
            "provides": facts["provides"] | {"branch"},
            "needs": facts["needs"] | {"numbered_samples"},
            "lacks": facts["lacks"] | {"one_round"},
        },
    )


def origins(x: Array, drawn: int, branches: int) -> Array:
    """Of arrays with one entry a first row, those that further rows belong to: row j of a prompt to its j-th, round
    and round."""
    groups = x.shape[0] // drawn
    return x.reshape(groups, drawn, *x.shape[1:])[:, jnp.arange(branches) % drawn].reshape(-1, *x.shape[1:])


def prompts_of(rows: Experience, drawn: int) -> Prompts:
    """The prompts of rows, one for each group."""
    of = lambda x: x[::drawn]  # noqa: E731
    return Prompts(
        of(rows.prompt_tokens),
        of(rows.prompt_length),
        of(rows.prompt_id),
        of(rows.answer_tokens),
        of(rows.answer_length),
        {name: of(value) for name, value in rows.fields.items()},
    )


def _check(inner: Plan, name: str, samples_per_prompt: int, branches: int) -> None:
    drawn = samples_per_prompt - branches
    require_inside(name, inner, "one_round", "equal_groups", "one_group_a_prompt")
    if not 0 < branches < samples_per_prompt:
        raise ValueError(
            f"{name}.branches is {branches} of rollout.samples_per_prompt {samples_per_prompt}; there must be a branch "
            "and a completion that it goes on from"
        )
    if inner.samples != drawn:
        raise ValueError(
            f"{name}.branches is {branches}, but the plan inside of it draws {inner.samples} completions of a prompt, "
            f"not {drawn}"
        )
    if inner.provides:
        raise ValueError(
            f"{name} is made around a plan whose rows know {sorted(inner.provides)[0]!r}, which branches do not; leave "
            "one of the two out"
        )


def _group_order(groups: int, drawn: int, branches: int) -> Int[Array, "B"]:
    """Rows of both rounds, those of a group one after the other: its first samples, then its branches."""
    number = jnp.arange(groups * (drawn + branches))
    place, group = number % (drawn + branches), number // (drawn + branches)
    return jnp.where(place < drawn, group * drawn + place, groups * drawn + group * branches + place - drawn)
