"""What must hold of a composed step before anything is compiled: every name provided, every part in keeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from jaxrl_llm.experience import Experience, Method
from jaxrl_llm.training.credit import CREDIT_FIELDS, CreditTerm
from jaxrl_llm.training.learn import LEARNER_NAMES, LossTerm
from jaxrl_llm.training.metrics import METRIC_NAMES
from jaxrl_llm.training.score import HOST_NAMES, RewardTerm
from jaxrl_llm.training.wiring import missing, names, nearest, signature

# Fields that the credit stage computes when, and only when, something names them.
ON_DEMAND = frozenset({"old_logprobs", "old_entropy", "reference_logprobs"})
COLLECTED = frozenset(f.name for f in fields(Experience) if f.default is not None) - ON_DEMAND
SCORED = COLLECTED | {"reward_components", "rewards", "correct"}


def wanted_fields(
    rewards: Sequence[RewardTerm],
    credit: Sequence[CreditTerm],
    losses: Sequence[LossTerm],
    *,
    samples_per_prompt: int,
    decode: Callable[[Sequence[int]], str] | None,
) -> frozenset[str]:
    """Check every name of a composition; return the on-demand fields that somebody wants.

    Raises:
      ValueError: when a function names what nothing provides (the message says what would), or a part contradicts
        another.
    """
    if not rewards:
        raise ValueError("rewards is empty; a step needs at least one reward function")
    if not losses:
        raise ValueError("losses is empty; a step needs at least one loss function")
    for kind, terms in (("reward", rewards), ("loss", losses)):
        seen = [term.name for term in terms]
        if twice := {name for name in seen if seen.count(name) > 1}:
            raise ValueError(f"{kind} {twice.pop()!r} is listed twice; give each a name of its own (name: ...)")
    for term in rewards:
        _require(term.function, f"reward {term.name!r}", COLLECTED | HOST_NAMES)
        if term.on_host and decode is None:
            raise ValueError(f"reward {term.name!r} reads text, so make_train_step needs decode= (token ids -> text)")
    available = SCORED | ON_DEMAND | {"step"}
    for term in credit:
        if term.field not in CREDIT_FIELDS:
            raise ValueError(f"credit fills {term.field!r}, which it cannot; {nearest(term.field, CREDIT_FIELDS)}")
        _require(term.function, f"{term.field} {term.name!r}", available)
        if samples_per_prompt == 1 and term.field == "advantages" and "group" in names(term.function):
            raise ValueError(
                f"rollout.samples_per_prompt is 1, but {term.name!r} compares the samples of a prompt, so every "
                "advantage would be 0; use at least 2 samples or a baseline that needs no group"
            )
        available |= {term.field}
    remembering = [term.memory_name for term in credit if isinstance(term.function, Method)]
    if twice := {name for name in remembering if remembering.count(name) > 1}:
        raise ValueError(
            f"credit entry {twice.pop()!r} is listed twice and remembers something, so both would share one memory; "
            "leave one out, or give each CreditTerm a name of its own"
        )
    for term in losses:
        _require(term.function, f"loss {term.name!r}", available | LEARNER_NAMES)
        if term.coefficient_changes:
            _require(term.coefficient, f"coefficient of {term.name!r}", available | METRIC_NAMES)
    everything = [t.function for t in (*credit, *losses)] + [t.coefficient for t in losses if t.coefficient_changes]
    # Optional data is passed where there is some, but never computed for its own sake.
    wanted = frozenset().union(*(signature(function).required for function in everything))
    if "kl_reference_per_token" in wanted:
        wanted |= {"reference_logprobs"}
    return wanted & ON_DEMAND


def _require(function: Any, what: str, available: frozenset[str]) -> None:
    for name in missing(function, available):
        provider = {
            "advantages": "add an entry to credit that fills it, for example advantages: group_normalized",
            "values": "a value model provides it",
            "turn": "a multi-turn environment provides it",
        }.get(name, nearest(name, available))
        raise ValueError(f"{what} names {name!r}, which nothing in this step provides; {provider}")
