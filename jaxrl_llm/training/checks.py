"""What must hold of a composed step before anything is compiled: every name provided, every part in keeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from jaxrl_llm.experience import Experience, Method
from jaxrl_llm.training.credit import CREDIT_FIELDS, VOCABULARY, CreditTerm
from jaxrl_llm.training.critics import BEFORE, CURRENT
from jaxrl_llm.training.learn import LEARNER_NAMES, LossTerm
from jaxrl_llm.training.metrics import METRIC_NAMES
from jaxrl_llm.training.provide import FROM_DATA, ON_DEMAND
from jaxrl_llm.training.score import HOST_NAMES, RewardTerm
from jaxrl_llm.training.wiring import missing, names, nearest, signature

COLLECTED = frozenset(f.name for f in fields(Experience) if f.default is not None) - {"extras"}
SCORED = COLLECTED | {"reward_components", "rewards", "correct"}


def wanted_fields(
    rewards: Sequence[RewardTerm],
    credit: Sequence[CreditTerm],
    losses: Sequence[LossTerm],
    *,
    samples_per_prompt: int,
    decode: Callable[[Sequence[int]], str] | None,
    with_critic: bool = False,
    provided: frozenset[str] = frozenset(),
    replay: bool = False,
    sampled: frozenset[str] = frozenset(),
) -> frozenset[str]:
    """Check every name of a composition; return the on-demand fields that somebody wants.

    Args:
      rewards, credit, losses: the functions of each stage.
      samples_per_prompt: rows of a group.
      decode: token ids -> text, if known.
      with_critic: a value model can be made.
      provided: names that the rollout or stored rows bring along.
      replay: rows of earlier steps are learned from again.
      sampled: names that the rollout brings along, so that rewards may read them.

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
        _require(term.function, f"reward {term.name!r}", COLLECTED | FROM_DATA | HOST_NAMES | sampled)
        if term.on_host and decode is None:
            raise ValueError(f"reward {term.name!r} reads text, so make_train_step needs decode= (token ids -> text)")
    available = SCORED | ON_DEMAND | provided | sampled | {"step"}
    if not with_critic:
        available -= BEFORE.keys()
    fixed = {f.name for f in fields(Experience)} - CREDIT_FIELDS.keys()
    for index, term in enumerate(credit):
        if term.field in fixed:
            raise ValueError(f"credit fills {term.field!r}, which it cannot; {nearest(term.field, CREDIT_FIELDS)}")
        what = f"{term.field} {term.name!r}"
        if term.over_vocabulary:
            _require(term.function, what, frozenset({VOCABULARY, "tokens"}))
        else:
            _require(term.function, what, available)
        later = [t.function for t in (*credit[index + 1 :], *losses)]
        later += [t.coefficient for t in losses if t.coefficient_changes]
        if term.field not in CREDIT_FIELDS and not any(term.field in names(function) for function in later):
            raise ValueError(
                f"credit fills {term.field!r}, which nothing after it reads; {nearest(term.field, CREDIT_FIELDS)}"
            )
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
    learner = LEARNER_NAMES if with_critic else LEARNER_NAMES - CURRENT.keys()
    for term in losses:
        _require(term.function, f"loss {term.name!r}", available | learner)
        if term.coefficient_changes:
            _require(term.coefficient, f"coefficient of {term.name!r}", available | METRIC_NAMES)
    if replay:
        _check_replay(losses)
    everything = [t.function for t in (*rewards, *credit, *losses)]
    everything += [t.coefficient for t in losses if t.coefficient_changes]
    # Optional data is passed where there is some, but never computed for its own sake.
    wanted = frozenset().union(*(signature(function).required for function in everything))
    if "kl_reference_per_token" in wanted:
        wanted |= {"reference_logprobs"}
    return wanted & ON_DEMAND


# What replayed rows know: what was stored of them, and what is computed of any rows before the update.
_REPLAYED = COLLECTED | {"rewards", "correct", "advantages"} | ON_DEMAND | LEARNER_NAMES


def _check_replay(losses: Sequence[LossTerm]) -> None:
    for term in losses:
        for name in signature(term.function).required:
            if name not in _REPLAYED or name in {"hidden", "prompt_logprobs", "prompt_mask", "baseline_rewards"}:
                raise ValueError(
                    f"loss {term.name!r} names {name!r}, which replayed rows do not have; leave the loss or replay out"
                )


def _require(function: Any, what: str, available: frozenset[str]) -> None:
    for name in missing(function, available):
        provider = {
            "advantages": "add an entry to credit that fills it, for example advantages: group_normalized",
            "turn": "add an entry to credit that fills it, for example turn: separated_turns",
            "turn_rewards": "a task that is answered in turns provides it (grid, calculator, self_correction), or an "
            "entry of credit that fills it, for example turn_rewards: reference_progress",
            "stored_logprobs": "stored answers provide it (section rehearsal)",
            "extra": "groups at another temperature provide it (rollout.extra)",
            **dict.fromkeys(
                (*BEFORE, *CURRENT), "a critic provides it (section critic, or make_train_step(critic=...))"
            ),
        }.get(name, nearest(name, available))
        raise ValueError(f"{what} names {name!r}, which nothing in this step provides; {provider}")
