"""The training step: collect, score, credit, learn.

    step = learn . credit . score . collect          state, metrics = step(state, prompts)

When every reward is traceable the step is one XLA program. When a reward reads text it is the same composition
with the host call between two jitted halves; the caller writes the same thing in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, Method, Prompts, TrainState
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.backend import compiler_options
from jaxrl_llm.parallel.rules import RULES, Rules, constrain_rows, laid_out
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.rollout.host_turns import HostTurns, host_turns
from jaxrl_llm.rollout.round_options import Adaptive, Budget, Refill
from jaxrl_llm.rollout.turns import TURN_FIELDS
from jaxrl_llm.training import provide
from jaxrl_llm.training.checks import wanted_fields
from jaxrl_llm.training.composition import Composition, Rollout
from jaxrl_llm.training.conversations import check_conversations, run_with_host_environment
from jaxrl_llm.training.credit import CreditTerm
from jaxrl_llm.training.critics import Critic
from jaxrl_llm.training.external_engine import (
    STALENESS,
    External,
    check_external,
    make_collect,
)
from jaxrl_llm.training.host_rewards import rewarded_on_host
from jaxrl_llm.training.learn import ROUTER, LossTerm, Update, checked_split
from jaxrl_llm.training.phases import (
    credit_and_learn,
    first_carry,
    initial_state,
    offloaded,
    primed,
    rounds_of,
    rounds_result,
    sample_ahead,
    sample_and_score,
    sample_round,
    score,
    step_behind,
    view_and_score,
    whole_step,
)
from jaxrl_llm.training.placement import (
    OFFLOADED,
    parameter_shardings,
    placed_state,
)
from jaxrl_llm.training.rounds import (
    POOL_FIELDS,
    Loop,
)
from jaxrl_llm.training.score import RewardTerm, with_rewards
from jaxrl_llm.training.stored import (
    Replay,
    StoredRows,
)
from jaxrl_llm.training.wiring import names, signature


@dataclass(frozen=True)
class TrainStep:
    """A step that was checked and composed. Calling it: (state, prompts, items=None, stored=None) -> (state, metrics).

    Attributes:
      init: (key, params=None) -> TrainState.
      run: (state, prompts, items, stored) -> (state, metrics, experience). One step off-policy, the prompts are those
        of the next step and the items those of this one.
      programs: the jitted functions that a step runs, in order; one when every reward is traceable.
      composition: what it was composed of.
      prime: (state, prompts) -> a state that holds the batch of its first step; None where a step samples its own.
    """

    init: Callable[..., TrainState]
    run: Callable[..., tuple[TrainState, dict[str, Array], Experience]]
    programs: tuple[Callable, ...]
    composition: Composition
    prime: Callable[[TrainState, Prompts], TrainState] | None = None

    def __call__(
        self,
        state: TrainState,
        prompts: Prompts,
        items: Sequence[dict] | None = None,
        stored: Experience | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step. The given state is donated: use the returned one.

        `items` is needed by host rewards only, `stored` by a step that was composed for stored rows.
        """
        state, metrics, _ = self.run(state, prompts, items, stored)
        return state, metrics


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    rollout: Rollout,
    rewards: Sequence[RewardTerm | Callable],
    credit: Sequence[CreditTerm | tuple[str, Callable]],
    losses: Sequence[LossTerm | Callable | tuple[Callable, Any]],
    update: Update | None = None,
    prompts_per_step: int | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    encode: Callable[[str], list[int]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = RULES,
    gather_for_rollout: bool = True,
    offload: Sequence[str] = (),
    critic: Critic | None = None,
    stored: StoredRows | None = None,
    replay: Replay | None = None,
    external: External | None = None,
) -> TrainStep:
    """Compose a training step from pure functions; what they name is what it computes.

    Args:
      model: the policy.
      optimizer: an optax transformation.
      rollout: how completions are sampled.
      rewards: reward functions; the first is the verifier that `correct` reports.
      credit: (field, function) pairs, in order; at least one fills `advantages` for a loss that names it.
      losses: loss functions, or (function, coefficient) pairs.
      update: epochs, minibatches, microbatches, reference refresh.
      prompts_per_step: prompts in a batch, if known: sizes that do not divide are then found here already.
      decode: token ids -> text, for rewards that read text and environments in Python.
      encode: text -> token ids, for environments in Python.
      mesh: devices to run on; None leaves placement to jax.
      rules: from the names of axes to those of the mesh.
      gather_for_rollout: with parameters that are sharded over `fsdp`, gather them once a rollout; else once a token.
      offload: what to keep in the host's memory between its uses: "optimizer", "reference". Needs a mesh.
      critic: how a value model is made, for functions that name one of its outputs.
      stored: rows that every call brings along, for losses on stored answers.
      replay: learning again from rows of earlier steps.
      external: an engine in another process that samples the completions.

    Returns:
      `TrainStep`.

    Raises:
      ValueError: when a function names what nothing provides, or a part contradicts another.
    """
    reward_terms = tuple(t if isinstance(t, RewardTerm) else RewardTerm(t, name=_name(t)) for t in rewards)
    credit_terms = tuple(t if isinstance(t, CreditTerm) else CreditTerm(*t, name=_name(t[1])) for t in credit)
    loss_terms = tuple(_loss_term(t) for t in losses)
    update = update or Update()
    for name, token in (*(("eos_ids", each) for each in rollout.eos_ids), ("pad_id", rollout.pad_id)):
        if not 0 <= token < model.vocabulary_size:
            raise ValueError(
                f"rollout.{name} is {getattr(rollout, name)}, but the model's symbols are 0 to "
                f"{model.vocabulary_size - 1}; take the id from the tokenizer that made the prompts"
            )
    for term in loss_terms:
        if not model.routed and (asked := sorted(set(ROUTER).intersection(signature(term.function).required))):
            raise ValueError(
                f"loss {term.name!r} names {asked[0]!r}, but the model is no mixture of experts; leave the loss out"
            )
    if rollout.replay_router:
        _check_router(model, rollout, stored=stored, replay=replay)
    joined = (stored.groups if stored else 0) + (replay.groups if replay else 0)
    if prompts_per_step is not None:
        extra = rollout.extra.groups(prompts_per_step) if rollout.extra else 0
        checked_split(update, prompts_per_step + extra, rollout.samples_per_prompt, loss_terms, joined)
    wanted = wanted_fields(
        reward_terms,
        credit_terms,
        loss_terms,
        samples_per_prompt=rollout.samples_per_prompt,
        decode=decode,
        with_critic=critic is not None,
        provided=(stored.provides if stored else frozenset())
        | ({"extra"} if rollout.extra else frozenset())
        | ({STALENESS} if external else frozenset())
        | (POOL_FIELDS if isinstance(rollout.rounds, Adaptive) else frozenset()),
        replay=replay is not None,
        sampled=TURN_FIELDS if rollout.environment is not None else frozenset(),
    )
    if rollout.demonstration_in_group:
        wanted |= provide.FROM_DATA
    if update.alignment_every_steps and not (
        stored and "validation" in stored.provides and any(t.on_written for t in loss_terms)
    ):
        raise ValueError(
            f"training.alignment_every_steps is {update.alignment_every_steps}, but alignment compares a loss on "
            "written completions with the others; add section supervised and losses: stored_likelihood"
        )
    if model.trained is not None and update.reference_decay is not None:
        raise ValueError(
            f"training.reference_decay is {update.reference_decay}, but the policy has adapters, whose moving average "
            "is not that of the matrices they stand for; leave it out, or use training.refresh_reference_every"
        )
    if rollout.extra and "baseline_rewards" in wanted:
        raise ValueError(
            "rollout.extra is set and something names 'baseline_rewards'; a greedy baseline and groups at another "
            "temperature cannot be had in one step, so leave one of them out"
        )
    if rollout.environment is not None:
        names_of = ("demonstration_in_group", "prefixes", "extra", "replay_router", "slots", "rounds")
        settings = {name: getattr(rollout, name) for name in names_of}
        others = {"replay": replay, "rollout.engine": external}
        check_conversations(rollout.environment, settings, wanted, others)
    if external is not None:
        check_external(rollout, wanted)
        if rollout.off_policy_steps:
            raise ValueError(
                "rollout.off_policy_steps is 1 and rollout.engine is set; an engine's policy is as old as "
                "rollout.engine.reload_every_steps says, so leave off_policy_steps out"
            )
    if rollout.truncation is not None:
        _check_truncation(credit_terms, loss_terms, stored=stored, replay=replay, engine=external)
    if rollout.rounds is not None:
        _check_rounds(rollout.rounds, wanted, update, loss_terms, stored=stored, replay=replay, engine=external)
    c = Composition(
        model,
        optimizer,
        rollout,
        reward_terms,
        credit_terms,
        loss_terms,
        update,
        wanted,
        mesh,
        critic=critic,
        stored=stored,
        replay=replay,
        external=external,
        rules=rules,
        gather_for_rollout=gather_for_rollout,
        offload=frozenset(offload),
        turns=_host_turns(model, rollout, decode, encode),
    )
    _check_offload(c)
    init = jax.jit(laid_out(partial(initial_state, c), mesh, rules))
    if mesh is not None:
        c = replace(
            c, placed=placed_state(model, jax.eval_shape(init, jax.random.key(0)), mesh, rules, offload=offload)
        )
        init = _initial_on_mesh(c)
    if external is not None:
        return _step_with_engine(c, init, external, decode)
    if c.turns is not None:
        halves = (_looking(c, _score_talks), _learning(c, credit_and_learn))
        return TrainStep(init, run_with_host_environment(c.turns, halves, reward_terms, decode), halves, c)
    on_host, behind = any(term.on_host for term in reward_terms), bool(rollout.off_policy_steps)
    prime = jax.jit(laid_out(partial(primed, c), mesh, rules), donate_argnums=0) if behind else None
    if not on_host:
        program = _learning(c, step_behind if behind else whole_step)
        return TrainStep(
            init, lambda state, prompts, items=None, stored=None: program(state, prompts, stored), (program,), c, prime
        )
    if behind:
        return _step_behind_with_host(c, init, prime, decode)
    programs = (_looking(c, sample_and_score), _learning(c, credit_and_learn))
    if isinstance(rollout.rounds, Refill | Adaptive):
        return TrainStep(init, _step_in_rounds(c, programs[1], decode), programs, c)
    return TrainStep(init, partial(_run_with_host, programs, reward_terms, decode), programs, c)


def _step_behind_with_host(c: Composition, init: Callable, prime: Any, decode: Any) -> TrainStep:
    """While the device samples the next batch, the host rewards the one that is there."""
    sample, learned = _looking(c, sample_ahead), _learning(c, credit_and_learn)

    def run(state, prompts, items=None, stored=None):
        ahead = sample(state, prompts)
        rows = rewarded_on_host(c.rewards, cast(Experience, state.ahead), _required(items), decode)
        state, metrics, experience = learned(replace(state, ahead=None), rows, stored)
        return replace(state, ahead=ahead), metrics, experience

    return TrainStep(init, run, (sample, learned), c, prime)


def _step_in_rounds(c: Composition, learned: Callable, decode: Any) -> Callable:
    """A step whose rounds wait for rewards on the host."""

    def start(c, state, prompts):
        return first_carry(c, cast(Loop, rounds_of(c, prompts)), state, prompts)

    def sample(c, state, prompts, carry):
        loop = cast(Loop, rounds_of(c, prompts))
        return sample_round(c, state, prompts, loop.request(carry)), loop.first_item(carry)

    def merge(c, prompts, carry, rows):
        loop = cast(Loop, rounds_of(c, prompts))
        carry = loop.merge(carry, with_rewards(rows, c.rewards))
        return carry, loop.unfinished(carry), rounds_result(loop, carry)

    begin, draw, keep = (_looking(c, function) for function in (start, sample, merge))

    def run(state, prompts, items=None, stored=None):
        items = _required(items)
        in_round = len(items) // (c.rollout.rounds.max_rounds if isinstance(c.rollout.rounds, Refill) else 1)
        carry, more, rows = begin(state, prompts), True, None
        while more:
            drawn, first = draw(state, prompts, carry)
            drawn = rewarded_on_host(c.rewards, drawn, items[int(first) :][:in_round], decode)
            carry, more, rows = keep(prompts, carry, drawn)
        return learned(state, rows, stored)

    return run


def _required(items: Sequence[dict] | None) -> Sequence[dict]:
    if items is None:
        raise ValueError(
            "this step has a reward that reads text: call step(state, prompts, items) with one dictionary "
            "a prompt (body, answer, ...)"
        )
    return items


def _step_with_engine(c: Composition, init: Callable, external: External, decode: Any) -> TrainStep:
    """A step that is sampled for, and then runs two programs; host rewards come between them where there are any."""
    programs = (_looking(c, view_and_score), _learning(c, credit_and_learn))
    collected = make_collect(c, external)
    both = (lambda state, prompts: programs[0](state, collected(state, prompts)), programs[1])
    if any(term.on_host for term in c.rewards):
        return TrainStep(init, partial(_run_with_host, both, c.rewards, decode), programs, c)

    def run(state, prompts, items=None, stored=None):
        return both[1](state, both[0](state, prompts), stored)

    return TrainStep(init, run, programs, c)


def _check_truncation(credit: Sequence[CreditTerm], losses: Sequence[LossTerm], **others: Any) -> None:
    """Refuse what has no place where only some tokens can be drawn."""
    whole = [t.name for t in credit if t.over_vocabulary]
    whole += [t.name for t in losses if "over_vocabulary" in names(t.function)]
    given = [name for name, value in others.items() if value is not None]
    if whole or given:
        what = f"{whole[0]!r} reads the whole vocabulary" if whole else f"{given[0]} rows were drawn otherwise"
        raise ValueError(f"rollout.top_k is set, but {what}; leave one of them out")


def _host_turns(model: Model, rollout: Rollout, decode: Any, encode: Any) -> HostTurns | None:
    """Programs for an environment in Python; None without one."""
    if not isinstance(rollout.environment, HostEnvironment):
        return None
    if decode is None or encode is None:
        raise ValueError("an environment in Python reads and writes text, so make_train_step needs decode= and encode=")
    return host_turns(
        model,
        rollout.environment,
        samples_per_prompt=rollout.samples_per_prompt,
        max_completion_tokens=rollout.max_completion_tokens,
        eos_ids=rollout.eos_ids,
        pad_id=rollout.pad_id,
        encode=encode,
        decode=decode,
        temperature=rollout.temperature,
        constrain=constrain_rows,
    )


def _check_rounds(
    rounds: Refill | Adaptive | Budget,
    wanted: frozenset[str],
    update: Update,
    losses: Sequence[LossTerm],
    **others: Any,
) -> None:
    """Refuse what rounds cannot be had with."""
    name = f"rollout.{type(rounds).__name__.lower()}"
    if "baseline_rewards" in wanted or others["engine"] is not None:
        what = "rollout.engine" if others["engine"] is not None else "a greedy baseline ('baseline_rewards')"
        raise ValueError(f"{name} is set together with {what}, which samples once; leave one of them out")
    if not isinstance(rounds, Budget):
        return
    if given := [other for other in ("stored", "replay") if others[other] is not None]:
        raise ValueError(f"{name} makes groups of different sizes, but {given[0]} rows come in equal ones; drop one")
    whole = [term.name for term in losses if "group" in names(term.function)]
    if whole and (update.minibatches_per_epoch > 1 or update.sequences_per_microbatch is not None):
        raise ValueError(
            f"{name} makes groups of different sizes, and loss {whole[0]!r} compares the samples of a prompt: leave "
            "training.sequences_per_microbatch out and set training.minibatches_per_epoch to 1"
        )


def _score_talks(c: Composition, state: TrainState, rows: Experience) -> Experience:
    return score(c, constrain_rows(rows))


def _looking(c: Composition, function: Callable) -> Callable:
    """A compiled stage, traced under the table of the mesh."""
    return jax.jit(laid_out(partial(function, c), c.mesh, c.rules), compiler_options=compiler_options(c.mesh))


def _learning(c: Composition, function: Callable) -> Callable:
    """A compiled stage that gives (state, numbers, rows). The state it is given is used up, and lies where it lay."""
    # Numbers are on every device, and rows are where the program has put them.
    returned = None if c.mesh is None else (c.placed, NamedSharding(c.mesh, P()), None)
    return jax.jit(
        laid_out(partial(function, c), c.mesh, c.rules),
        donate_argnums=0,
        out_shardings=returned,
        compiler_options=compiler_options(c.mesh),
    )


def _initial_on_mesh(c: Composition) -> Callable[..., TrainState]:
    """`initial_state`, every array made where it will lie: no device ever holds the whole of it."""
    assert c.mesh is not None
    whole = {name: getattr(c.placed, name) for name in offloaded(c)}
    on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), c.placed)
    program = jax.jit(laid_out(partial(initial_state, c), c.mesh, c.rules), out_shardings=on_device)
    lies = parameter_shardings(c.model, c.mesh, c.rules)

    def init(key: Array, params: PyTree | None = None) -> TrainState:
        state = program(key, None if params is None else jax.device_put(params, lies))
        return replace(state, **{name: jax.device_put(getattr(state, name), there) for name, there in whole.items()})

    return init


def _check_offload(c: Composition) -> None:
    if unknown := sorted(c.offload - OFFLOADED.keys()):
        raise ValueError(f"training.offload names {unknown[0]!r}; it can name {', '.join(OFFLOADED)}")
    if c.offload and c.mesh is None:
        raise ValueError(
            f"offload is {sorted(c.offload)} without a mesh; pass mesh=make_mesh(), which may be of one device"
        )
    if "reference" in c.offload and not c.copies_reference:
        raise ValueError(
            "training.offload names reference, but the step keeps no copy of a reference policy; leave it out"
        )


def _check_router(model: Model, rollout: Rollout, **others: Any) -> None:
    """Refuse rows whose experts nobody recorded."""
    if not model.routed:
        raise ValueError(
            "rollout.replay_router is true, but the model is no mixture of experts; leave it out, or set model.experts"
        )
    others["rollout.demonstration_in_group"] = rollout.demonstration_in_group
    if given := [name for name, value in others.items() if value]:
        raise ValueError(
            f"rollout.replay_router is true and {given[0]} brings rows that were not sampled in this step, for which "
            "no experts are recorded; leave one of them out"
        )


def _run_with_host(programs, reward_terms, decode, state, prompts, items=None, stored=None):
    """The same step in two programs, with the host rewards between them."""
    items = _required(items)
    experience = rewarded_on_host(reward_terms, programs[0](state, prompts), items, decode)
    return programs[1](state, experience, stored)


def _name(function: Any) -> str:
    function = getattr(function, "func", function)
    if isinstance(function, Method):
        function = function.update
    return getattr(function, "__name__", type(function).__name__).lstrip("_")


def _loss_term(term: Any) -> LossTerm:
    if isinstance(term, LossTerm):
        return term
    function, coefficient = term if isinstance(term, tuple) and not callable(term) else (term, 1.0)
    return LossTerm(function, coefficient, _name(function))
