"""How the completions of a step are requested: rounds of requests, and the rows that are kept.

    carry = init(memory, key, prompts, rows)
    while unfinished(carry):  carry = merge(carry, sampled(requests(carry)))
    rows, report = result(carry)

Pure functions of arrays. A plan whose `merge` reads rewards has them between the rounds: inside the program where every
reward is traceable, and around its pieces where one is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rollout.capabilities import ROWS, require
from jaxrl_llm.rollout.generation import Pause
from jaxrl_llm.rollout.prefixes import Prefixes


class Request(NamedTuple):
    """A request to the sampler: rows of some prompts, grouped by prompt.

    Attributes:
      prompts: N of them.
      samples_per_prompt: G; with `prompt_of`, at most.
      temperature: one number, or one for each of the G sample numbers; None is that of the rollout.
      first_sample: number of the first sample of a prompt; it addresses the random keys. One number, or one a prompt.
      first_group: id of the first group.
      active: prompts that are sampled; the rows of the others have weight 0. None samples all.
      prompt_of: prompt of each row, in ascending order, for groups of different sizes.
      prefixes: what completions start with.
      stop_ids: tokens at which completions stop for now, beside the ends of sequence.
      limit: tokens at which each completion stops for now; None writes them to their end.
      begun: steps since the completions of each prompt were begun, whose random numbers they have; None is 0.
      pause: where completions are looked at before they go on; None looks at none.
      fields: what all rows of the request know beside the rest, by name: one number for all.
    """

    prompts: Prompts
    samples_per_prompt: int
    temperature: float | Float[Array, "G"] | None = None
    first_sample: int | Int[Array, "..."] = 0
    first_group: int = 0
    active: Bool[Array, "N"] | None = None
    prompt_of: Int[Array, "B"] | None = None
    prefixes: Prefixes | None = None
    stop_ids: tuple[int, ...] = ()
    limit: Int[Array, "B"] | None = None
    begun: Int[Array, "N"] | None = None
    pause: Pause | None = None
    fields: Mapping[str, Any] = {}


def no_memory() -> None:
    """The memory of a plan without memory."""
    return None


class Plan(NamedTuple):
    """A plan, as pure functions of a carry and of a memory that is kept between steps.

    Attributes:
      init: (memory, key, prompts, rows of one round as shapes) -> carry before the first round.
      requests: (memory, carry, prompts) -> requests of the next round; their number is constant.
      merge: (carry, rows of all requests, one after the other) -> carry.
      unfinished: carry -> whether there is another round. Never read of a plan of one round.
      result: carry -> (rows of the step, numbers to report by name).
      memory: () -> what it remembers before the first step.
      remember: (memory, rows after credit) -> memory.
      samples: rows of a prompt that learn.
      drawn: rows of a prompt that the first request samples.
      most_rounds: rounds at most. 1 is no loop.
      unrolled: there are exactly `most_rounds` rounds, which may ask for different numbers of rows. `init` is called
        without the rows of a round then, of one round too.
      prompts_per_group: prompts that a step is handed for each group that it learns from.
      reads_rewards: `merge` reads rewards.
      reads: names of the data that it reads of the prompts (`Prompts.fields`).
      readings: (name, function of text) pairs: what rows of each round know before `merge`, beside rewards.
      provides: names that its rows know.
      reports: names of what it reports.
      lacks: what its rows are not, of `capabilities.ROWS`.
      needs: what it needs of the sampler, of `capabilities.CAPABILITIES`.
      extra_groups: (prompts) -> groups that come on top of one a prompt.
    """

    init: Callable[[Any, Array, Prompts, Experience], Any]
    requests: Callable[[Any, Any, Prompts], tuple[Request, ...]]
    merge: Callable[[Any, Experience], Any]
    result: Callable[[Any], tuple[Experience, dict[str, Array]]]
    samples: int
    drawn: int
    unfinished: Callable[[Any], Array] = lambda carry: jnp.bool_(False)
    memory: Callable[[], PyTree] = no_memory
    remember: Callable[[Any, Experience], Any] = lambda memory, rows: memory
    most_rounds: int = 1
    unrolled: bool = False
    prompts_per_group: int = 1
    reads_rewards: bool = False
    reads: frozenset[str] = frozenset()
    readings: tuple[tuple[str, Callable], ...] = ()
    provides: frozenset[str] = frozenset()
    reports: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    extra_groups: Callable[[int], int] = lambda prompts: 0


@ranged
def plain(*, samples_per_prompt: Count) -> Plan:
    """One round: `samples_per_prompt` completions of each prompt."""

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        return (Request(prompts, samples_per_prompt, first_sample=numbers_before(prompts, samples_per_prompt)),)

    return Plan(
        init=lambda memory, key, prompts, rows: None,
        requests=requests,
        merge=lambda carry, rows: rows,
        result=lambda rows: (rows, {}),
        samples=samples_per_prompt,
        drawn=samples_per_prompt,
    )


def numbers_before(prompts: Prompts, numbers: int) -> int | Int[Array, "N"]:
    """Sample numbers that earlier copies of each prompt use, if each copy uses this many."""
    repeat = prompts.fields.get("repeat")
    return 0 if repeat is None else repeat * numbers


def require_inside(name: str, inner: Plan, *needs: str) -> None:
    """Raises ValueError if the rows of the inner plan lack fields that the outer plan needs."""
    require(f"rollout.plan.{name}", set(needs), "the plan inside of it", ROWS - inner.lacks)


def first_requests(inner: Plan, memory: Any, prompts: Prompts) -> tuple[Request, ...]:
    """The requests of a plan of one round, which do not depend on its carry."""
    return inner.requests(memory, None, prompts)


def finished(inner: Plan, rows: Experience) -> tuple[Experience, dict[str, Array]]:
    """The final rows of a plan of one round, from the sampled rows."""
    return inner.result(inner.merge(None, rows))


def empty_like(rows: Experience) -> Experience:
    """Rows of zeros with the shapes of these."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rows)


def concatenated(*parts: Experience) -> Experience:
    """Concatenated rows; all parts have the same fields."""
    there = [part for part in parts if part.tokens.shape[0]]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *there) if len(there) > 1 else there[0]


def request_rows(request: Request, rows: Experience) -> Experience:
    """The sampled rows of a request, with its group ids and fields."""
    count = rows.tokens.shape[0]
    if request.first_group:
        rows = replace(rows, group=rows.group + request.first_group)
    return rows.filled(**{name: jnp.full(count, value) for name, value in request.fields.items()})
