"""The training step: collect, fill, learn.

    step = learn . fill . collect          state, metrics = step(state, prompts)

`step_parts` lists the parts of the step in order. `segments.compiled` compiles them: into one program if everything is
traceable, or several with host calls between them if a part reads text, calls an engine, or uses an environment in
Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optax
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts, TrainState
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.terms import Fill, LossTerm, Reward, Update
from jaxrl_llm.training.checks import checked, checked_split
from jaxrl_llm.training.collect import collected, handed, join, kept_in_mind
from jaxrl_llm.training.composition import Composition, Resources, Source, composition_of
from jaxrl_llm.training.fill import coefficients, credit_parts, reward_parts
from jaxrl_llm.training.gradients import measured_alignment
from jaxrl_llm.training.initial import in_use, initialiser
from jaxrl_llm.training.learn import make_learn
from jaxrl_llm.training.metrics import step_metrics
from jaxrl_llm.training.networks import moved
from jaxrl_llm.training.reading import Context, reads_items
from jaxrl_llm.training.scores import viewed
from jaxrl_llm.training.segments import Host, Learn, Program, Segment, Traced, Work, compiled, programs, put_back, run

AHEAD = "ahead"


def step_parts(c: Composition) -> list[Any]:
    """The whole step: collecting rows, filling fields, and the update."""
    if c.rollout is None:
        rows = [*handed(c), *reward_parts(c, "rows")]
    elif c.rollout.off_policy_steps:
        # The waiting batch is trained on while the next one is sampled; the two are independent.
        swap: Any = Traced("ahead", _swapped)
        if any(term.on_host for term in c.rewards):  # reads the waiting rows while the next ones are sampled
            swap = Host("ahead", lambda state, work, context: _swapped(state, work), _swapped)
        rows = [*collected(c, reward_parts(c, "drawn"), ahead=True), swap]
    else:
        rows = collected(c, reward_parts(c, "drawn"))
    if c.rollout is not None and not c.plan.reads_rewards:
        rows += reward_parts(c, "rows")
    return [*rows, *credit_parts(c), Learn("learn", partial(learned, c))]


def learned(c: Composition, state: TrainState, work: Work) -> tuple[TrainState, dict[str, Array], Experience]:
    """Rows with all fields -> the new state, metrics, and the sampled rows."""
    rows, memory = work["rows"], dict(work["memory"])
    # The waiting batch keeps the sharding of the sampler, which `placed` does not contain.
    state = replace(state, store={name: kept for name, kept in state.store.items() if name != AHEAD})
    if c.rollout is None:
        checked_split(c, rows.tokens.shape[0] // c.samples)
    metrics = step_metrics(c, state, rows, work)
    batch, store, joined = join(c, state, rows, work, partial(viewed, c, state, wanted=c.wanted, own_samples=False))
    if c.update.alignment_every_steps:
        metrics["alignment"] = measured_alignment(c, state, batch)
    factors, memory = coefficients(c, rows, metrics, memory, state.step)
    memory, told = kept_in_mind(c, state, memory, rows)
    new, numbers = make_learn(c)(in_use(c, state), batch, factors, joined=c.joined_groups)
    new = replace(moved(c.model, c.networks, new), memory=memory, store=store)
    numbers |= joined
    numbers |= {f"coefficient/{t.name}": f for t, f in zip(c.losses, factors, strict=True) if t.coefficient_changes}
    new = put_back(new, c.placed)
    if c.rollout is not None and c.rollout.off_policy_steps:
        new = replace(new, store={**new.store, AHEAD: work[AHEAD]})
    return new, metrics | numbers | told, rows


def _swapped(state: TrainState, work: Work) -> Work:
    """Swap the sampled rows, which now wait, with the rows that have waited, which belong to earlier prompts."""
    return {AHEAD: work["rows"], "rows": state.store[AHEAD], "prompts": None}


@dataclass(frozen=True)
class TrainStep:
    """A checked training step. Call: (state, prompts, items, written) -> (state, metrics).

    Attributes:
      init: (key, params=None, networks=None) -> TrainState; with parameters of the policy, and of other networks by
          name.
      composition: its parts.
      segments: its programs and host calls.
      priming: the programs and host calls of `prime`.
    """

    init: Callable[..., TrainState]
    composition: Composition
    segments: tuple[Segment, ...]
    priming: tuple[Segment, ...] = ()

    @property
    def programs(self) -> tuple[Program, ...]:
        """The compiled programs of a step, in order; a single one if everything is traceable."""
        return programs(self.segments)

    def __call__(
        self,
        state: TrainState,
        prompts: Prompts | None = None,
        items: Sequence[Mapping[str, Any]] | None = None,
        written: Experience | None = None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run one step. The given state is donated: use the returned one.

        `items` is needed by readings and environments in Python, `written` by a step with written rows. One step
        off-policy, pass the prompts of the next step and the items of this one.
        """
        state, metrics, _ = self.run(state, prompts, items, written)
        return state, metrics

    def run(
        self,
        state: TrainState,
        prompts: Prompts | None = None,
        items: Sequence[Mapping[str, Any]] | None = None,
        written: Experience | None = None,
        call: Any = None,
        stop: Callable[[], None] | None = None,
    ) -> tuple[TrainState, dict[str, Any], Experience]:
        """Like calling the step, and also returns the rows of the step.

        `call`, from `opened(environment)`, is the caller of an open environment. `stop` is called before each program
        and each host call; if it raises, the given state is unchanged.
        """
        context = self._context(items, call)
        if stop is not None:
            context.stop = stop
        state, metrics, rows = run(self.segments, state, given_work(prompts, written), context)
        return state, metrics | context.numbers, rows

    def prime(self, state: TrainState, prompts: Prompts, items: Any = None, call: Any = None) -> TrainState:
        """For off-policy steps: a state that holds the batch of the first step; otherwise the state itself."""
        if not self.priming:
            return state
        context = self._context(items, call)
        work = run(self.priming, state, given_work(prompts, None), context)
        return replace(state, store={**state.store, AHEAD: work["rows"]})

    def _context(self, items: Any, call: Any) -> Context:
        """The host resources of a step; raises ValueError if something is missing, before anything is computed."""
        c = self.composition
        ends = () if c.rollout is None else tuple(c.rollout.eos_ids)
        context = Context(items, c.resources.decode, c.resources.encode, ends, call)
        environment = None if c.rollout is None else c.rollout.environment
        if isinstance(environment, HostEnvironment) or reads_items(
            (*c.rewards, *c.credit, *c.views.values()), c.resources.columns
        ):
            context.required_items()
        return context


def given_work(prompts: Prompts | None, written: Experience | None) -> Work:
    """The initial work of a step."""
    given = {"prompts": prompts, "written": written}
    return {name: value for name, value in given.items() if value is not None}


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    source: Source | Sequence[Source],
    losses: Sequence[LossTerm | Callable | tuple[Callable, Any]],
    rewards: Sequence[Reward | Callable | tuple[Callable, float]] = (),
    credit: Sequence[Fill | tuple[Any, Any]] = (),
    update: Update | None = None,
    resources: Resources | None = None,
) -> TrainStep:
    """Compose a training step from pure functions; it computes the fields that their parameters name.

    Args:
      model: the policy.
      optimizer: of the policy.
      source: sources of rows: a `Rollout`, `Written` rows, and `Replay` beside a rollout.
      losses: loss functions, or (function, coefficient) pairs.
      rewards: reward functions, or (function, weight) pairs; the first is the verifier that `correct` reports.
      credit: (name or names, function) pairs, in order; one must fill `advantages` if a loss reads it.
      update: epochs, minibatches, microbatches.
      resources: text, networks, views, devices.

    Returns:
      `TrainStep`.

    Raises:
      ValueError: if a function reads a name that nothing provides, or a part needs a capability that another does not
      offer.
    """
    c = checked(composition_of(model, optimizer, source, rewards, credit, losses, update, resources))
    place = c.resources.placement
    init, c = initialiser(c)
    priming: tuple[Segment, ...] = ()
    returned = c.placed
    if c.rollout is not None and c.rollout.off_policy_steps:
        priming = compiled(collected(c, reward_parts(c, "drawn")), place, c.placed)
        if returned is not None:
            returned = replace(returned, store={**returned.store, AHEAD: None})
    return TrainStep(init, c, compiled(step_parts(c), place, returned), priming)
