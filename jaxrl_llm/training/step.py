"""The training step: collect, score, credit, learn.

    step = learn . credit . score . collect          state, metrics = step(state, prompts)

When every reward is traceable the step is one XLA program. When a reward reads text it is the same composition
with the host call between two jitted halves; the caller writes the same thing in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, KeyUse, Method, Prompts, TrainState
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.mesh import constrain_replicated, replicate, row_constraint
from jaxrl_llm.rollout.generate import generate
from jaxrl_llm.rollout.score import predicting_hidden
from jaxrl_llm.training.credit import CREDIT_FIELDS, CreditTerm, apply_credit
from jaxrl_llm.training.learn import LEARNER_NAMES, LossTerm, Update, checked_split, make_learn
from jaxrl_llm.training.metrics import experience_metrics
from jaxrl_llm.training.score import HOST_NAMES, RewardTerm, host_components, traceable_components, with_rewards
from jaxrl_llm.training.wiring import call, fields_of, names, nearest, signature

# Fields that the credit stage computes when, and only when, something names them.
ON_DEMAND = frozenset({"old_logprobs", "old_entropy", "reference_logprobs"})
COLLECTED = frozenset(f.name for f in fields(Experience) if f.default is not None) - ON_DEMAND
SCORED = COLLECTED | {"reward_components", "rewards", "correct"}
METRIC_NAMES = frozenset(
    {
        "reward",
        "correct_share",
        "constant_group_share",
        "completion_tokens",
        "truncated_share",
        "entropy_per_token",
        "kl_reference_per_token",
    }
)


@dataclass(frozen=True)
class Rollout:
    """How completions are sampled.

    Attributes:
      samples_per_prompt: completions drawn for each prompt.
      max_completion_tokens: longest completion, end of sequence included.
      eos_id: token that ends a completion.
      pad_id: token that fills the rest; may equal `eos_id`.
      temperature: of the softmax, above 0; the trainer scores at the same temperature.
    """

    samples_per_prompt: int
    max_completion_tokens: int
    eos_id: int
    pad_id: int
    temperature: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}; training samples need a temperature above 0 "
                "(greedy decoding is for evaluation)"
            )


@dataclass(frozen=True)
class TrainStep:
    """A step that was checked and composed. Calling it: (state, prompts, items=None) -> (state, metrics).

    Attributes:
      init: (key, params=None) -> TrainState.
      run: (state, prompts, items) -> (state, metrics, experience).
      programs: the jitted functions that a step runs, in order; one when every reward is traceable.
      rewards, credit, losses, rollout, update: what it was composed of.
      wanted: on-demand fields that something names, and so the step computes.
    """

    init: Callable[..., TrainState]
    run: Callable[..., tuple[TrainState, dict[str, Array], Experience]]
    programs: tuple[Callable, ...]
    rewards: tuple[RewardTerm, ...]
    credit: tuple[CreditTerm, ...]
    losses: tuple[LossTerm, ...]
    rollout: Rollout
    update: Update
    wanted: frozenset[str]

    def __call__(
        self, state: TrainState, prompts: Prompts, items: Sequence[dict] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step. The given state is donated: use the returned one. `items` is needed by host rewards only."""
        state, metrics, _ = self.run(state, prompts, items)
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
    mesh: jax.sharding.Mesh | None = None,
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
      decode: token ids -> text, for rewards that read text.
      mesh: devices to spread rows over; None leaves placement to jax.

    Returns:
      `TrainStep`.

    Raises:
      ValueError: when a function names what nothing provides, or a part contradicts another.
    """
    reward_terms = tuple(t if isinstance(t, RewardTerm) else RewardTerm(t, name=_name(t)) for t in rewards)
    credit_terms = tuple(t if isinstance(t, CreditTerm) else CreditTerm(*t, name=_name(t[1])) for t in credit)
    loss_terms = tuple(_loss_term(t) for t in losses)
    update = update or Update()
    for name in ("eos_id", "pad_id"):
        if not 0 <= getattr(rollout, name) < model.vocabulary_size:
            raise ValueError(
                f"rollout.{name} is {getattr(rollout, name)}, but the model's symbols are 0 to "
                f"{model.vocabulary_size - 1}; take the id from the tokenizer that made the prompts"
            )
    if prompts_per_step is not None:
        checked_split(update, prompts_per_step, rollout.samples_per_prompt, loss_terms)
    wanted = _checked(reward_terms, credit_terms, loss_terms, rollout, decode)
    constrain = row_constraint(mesh)
    learn = make_learn(
        model,
        optimizer,
        loss_terms,
        update,
        temperature=rollout.temperature,
        samples_per_prompt=rollout.samples_per_prompt,
    )
    stateful = {t.memory_name: t.function for t in credit_terms if isinstance(t.function, Method)}
    stateful |= {f"coefficient:{t.name}": t.coefficient for t in loss_terms if isinstance(t.coefficient, Method)}
    with_reference = "reference_logprobs" in wanted or any("over_vocabulary" in names(t.function) for t in loss_terms)

    def init(key: Array, params: PyTree | None = None) -> TrainState:
        """A fresh state; `params` are copied, so the caller's stay usable after donation."""
        started = (
            model.init(jax.random.fold_in(key, KeyUse.INITIALISE)) if params is None else jax.tree.map(jnp.copy, params)
        )
        state = TrainState(
            params=started,
            optimizer_state=optimizer.init(started),
            reference_params=jax.tree.map(jnp.copy, started) if with_reference else None,
            # Copied, because a method may use one zero array twice, and donation wants every buffer once.
            memory={name: jax.tree.map(jnp.copy, method.init()) for name, method in stateful.items()},
            key=jnp.copy(key),
            step=jnp.int32(0),
        )
        return state if mesh is None else replicate(state, mesh)

    def collect(state: TrainState, prompts: Prompts) -> Experience:
        checked_split(update, prompts.tokens.shape[0], rollout.samples_per_prompt, loss_terms)
        experience = generate(
            model,
            state.params,
            prompts,
            jax.random.fold_in(state.key, KeyUse.ROLLOUT),
            state.step,
            samples_per_prompt=rollout.samples_per_prompt,
            max_completion_tokens=rollout.max_completion_tokens,
            eos_id=rollout.eos_id,
            pad_id=rollout.pad_id,
            temperature=rollout.temperature,
            constrain=constrain,
        )
        return constrain(replace(experience, reward_components=traceable_components(reward_terms, experience)))

    def credit_stage(state: TrainState, experience: Experience) -> tuple[Experience, dict[str, Any]]:
        experience = with_rewards(experience, reward_terms)
        if "old_logprobs" in wanted:  # one forward function: the sampler's numbers are the trainer's
            experience = replace(experience, old_logprobs=experience.behaviour_logprobs)
        if "old_entropy" in wanted:
            experience = replace(experience, old_entropy=experience.behaviour_entropy)
        if "reference_logprobs" in wanted:
            experience = replace(experience, reference_logprobs=reference_logprobs(state, experience))
        return apply_credit(credit_terms, experience, state.memory, state.step)

    def reference_logprobs(state: TrainState, rows: Experience) -> Array:
        reference = state.reference_params
        hidden = predicting_hidden(model, reference, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)
        return token_statistics(model, reference, hidden, rows.tokens, temperature=rollout.temperature).logprobs

    def coefficients(experience: Experience, metrics: dict, memory: dict, step: Array) -> tuple[list, dict]:
        provided = fields_of(experience) | metrics | {"step": step}
        values, memory = [], dict(memory)
        for term in loss_terms:
            value = term.coefficient
            if isinstance(value, Method):
                value, memory[f"coefficient:{term.name}"] = call(value, provided, memory[f"coefficient:{term.name}"])
            elif callable(value):
                value = call(value, provided)
            values.append(jnp.asarray(value, jnp.float32))
        return values, memory

    def update_stage(state: TrainState, experience: Experience) -> tuple[TrainState, dict[str, Array], Experience]:
        sampled = experience.weight
        experience, memory = credit_stage(state, experience)
        metrics = experience_metrics(experience, sampled)
        values, memory = coefficients(experience, metrics, memory, state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.key, KeyUse.MINIBATCHES), state.step)
        params, optimizer_state, learned = learn(
            state.params, state.optimizer_state, state.reference_params, experience, values, key
        )
        for term, value in zip(loss_terms, values, strict=True):
            if callable(term.coefficient) or isinstance(term.coefficient, Method):
                learned[f"coefficient/{term.name}"] = value
        state = replace(state, params=params, optimizer_state=optimizer_state, memory=memory, step=state.step + 1)
        return constrain_replicated(_refreshed(state, update), mesh), metrics | learned, experience

    def whole_step(state: TrainState, prompts: Prompts):
        return update_stage(state, collect(state, prompts))

    if not any(term.on_host for term in reward_terms):
        program = jax.jit(whole_step, donate_argnums=0)
        run = lambda state, prompts, items=None: program(state, prompts)  # noqa: E731
        programs = (program,)
    else:
        programs = (jax.jit(collect), jax.jit(update_stage, donate_argnums=0))
        run = partial(_run_with_host, programs, reward_terms, decode)
    return TrainStep(jax.jit(init), run, programs, reward_terms, credit_terms, loss_terms, rollout, update, wanted)


def _run_with_host(programs, reward_terms, decode, state, prompts, items=None):
    """The same step in two programs, with the host rewards between them."""
    if items is None:
        raise ValueError(
            "this step has a reward that reads text: call step(state, prompts, items) with one dictionary "
            "a prompt (body, answer, ...)"
        )
    experience = programs[0](state, prompts)
    components = host_components(reward_terms, experience, items, decode)
    placement = experience.reward_components.sharding
    if isinstance(placement, NamedSharding):  # without a mesh, placing them by hand would compile both programs twice
        components = jax.device_put(components, placement)
    return programs[1](state, replace(experience, reward_components=components))


def _refreshed(state: TrainState, update: Update) -> TrainState:
    """Copy the policy into the reference every `refresh_reference_every` steps."""
    if state.reference_params is None or not update.refresh_reference_every:
        return state
    due = state.step % update.refresh_reference_every == 0
    reference = jax.tree.map(lambda new, old: jnp.where(due, new, old), state.params, state.reference_params)
    return replace(state, reference_params=reference)


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


def _checked(rewards, credit, losses, rollout: Rollout, decode) -> frozenset[str]:
    """Check every name before anything is compiled; return the on-demand fields that somebody wants."""
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
        if rollout.samples_per_prompt == 1 and term.field == "advantages" and "group" in names(term.function):
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
        if callable(term.coefficient) or isinstance(term.coefficient, Method):
            _require(term.coefficient, f"coefficient of {term.name!r}", available | METRIC_NAMES)
    everything = [t.function for t in (*credit, *losses)] + [
        t.coefficient for t in losses if callable(t.coefficient) or isinstance(t.coefficient, Method)
    ]
    # Optional data is passed where there is some, but never computed for its own sake.
    wanted = frozenset().union(*(signature(function).required for function in everything))
    if "kl_reference_per_token" in wanted:
        wanted |= {"reference_logprobs"}
    return wanted & ON_DEMAND


def _require(function: Any, what: str, available: frozenset[str]) -> None:
    for name in signature(function).required:
        if name not in available:
            provider = {
                "advantages": "add an entry to credit that fills it, for example advantages: group_normalized",
                "values": "a value model provides it",
                "turn": "a multi-turn environment provides it",
            }.get(name, nearest(name, available))
            raise ValueError(f"{what} names {name!r}, which nothing in this step provides; {provider}")
