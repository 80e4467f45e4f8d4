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
from jaxrl_llm.training.checks import wanted_fields
from jaxrl_llm.training.credit import CreditTerm, apply_credit
from jaxrl_llm.training.learn import LossTerm, Update, checked_split, make_learn
from jaxrl_llm.training.metrics import experience_metrics
from jaxrl_llm.training.score import RewardTerm, host_components, traceable_components, with_rewards
from jaxrl_llm.training.wiring import call, fields_of, names


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
class Composition:
    """What a step is composed of, checked. The stages below are functions of it and of arrays.

    Attributes:
      model: the policy.
      optimizer: an optax transformation.
      rollout: how completions are sampled.
      rewards, credit, losses: the functions of each stage.
      update: epochs, minibatches, microbatches, reference refresh.
      wanted: on-demand fields that something names, and so the step computes.
      mesh: devices that rows are spread over, or None.
    """

    model: Model
    optimizer: optax.GradientTransformation
    rollout: Rollout
    rewards: tuple[RewardTerm, ...]
    credit: tuple[CreditTerm, ...]
    losses: tuple[LossTerm, ...]
    update: Update
    wanted: frozenset[str]
    mesh: jax.sharding.Mesh | None

    @property
    def with_reference(self) -> bool:
        """Whether something compares the policy with a reference."""
        return "reference_logprobs" in self.wanted or any("over_vocabulary" in names(t.function) for t in self.losses)

    @property
    def stateful(self) -> dict[str, Method]:
        """Methods that remember something, by the name of their memory."""
        methods = {t.memory_name: t.function for t in self.credit if isinstance(t.function, Method)}
        return methods | {t.memory_name: t.coefficient for t in self.losses if isinstance(t.coefficient, Method)}


def initial_state(c: Composition, key: Array, params: PyTree | None = None) -> TrainState:
    """A fresh state. Everything is copied, so the caller's arrays stay usable after the state is donated."""
    copied = partial(jax.tree.map, jnp.copy)
    params = c.model.init(jax.random.fold_in(key, KeyUse.INITIALISE)) if params is None else copied(params)
    state = TrainState(
        params=params,
        optimizer_state=c.optimizer.init(cast(Any, params)),
        reference_params=copied(params) if c.with_reference else None,
        # A method may use one zero array twice, and donation wants every buffer once.
        memory={name: copied(method.init()) for name, method in c.stateful.items()},
        key=jnp.copy(key),
        step=jnp.int32(0),
    )
    return state if c.mesh is None else replicate(state, c.mesh)


def collect(c: Composition, state: TrainState, prompts: Prompts) -> Experience:
    """Prompts -> completions with the log-probabilities that they were drawn with."""
    checked_split(c.update, prompts.tokens.shape[0], c.rollout.samples_per_prompt, c.losses)
    return generate(
        c.model,
        state.params,
        prompts,
        jax.random.fold_in(state.key, KeyUse.ROLLOUT),
        state.step,
        samples_per_prompt=c.rollout.samples_per_prompt,
        max_completion_tokens=c.rollout.max_completion_tokens,
        eos_id=c.rollout.eos_id,
        pad_id=c.rollout.pad_id,
        temperature=c.rollout.temperature,
        constrain=row_constraint(c.mesh),
    )


def score(c: Composition, experience: Experience) -> Experience:
    """Completions -> one column for each reward; host rewards fill theirs after this program."""
    components = traceable_components(c.rewards, experience)
    return row_constraint(c.mesh)(replace(experience, reward_components=components))


def credit(c: Composition, state: TrainState, experience: Experience) -> tuple[Experience, dict[str, Any]]:
    """Reward components -> rewards -> advantages and whatever else the credit list fills in."""
    experience = with_rewards(experience, c.rewards)
    if "old_logprobs" in c.wanted:  # one forward function: the sampler's numbers are the trainer's
        experience = replace(experience, old_logprobs=experience.behaviour_logprobs)
    if "old_entropy" in c.wanted:
        experience = replace(experience, old_entropy=experience.behaviour_entropy)
    if "reference_logprobs" in c.wanted:
        experience = replace(experience, reference_logprobs=reference_logprobs(c, state, experience))
    return apply_credit(c.credit, experience, state.memory, state.step)


def reference_logprobs(c: Composition, state: TrainState, rows: Experience) -> Array:
    """Log-probabilities of the completions under the reference, by the function that the policy goes through."""
    params = state.reference_params
    hidden = predicting_hidden(c.model, params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)
    return token_statistics(c.model, params, hidden, rows.tokens, temperature=c.rollout.temperature).logprobs


def coefficients(
    c: Composition, experience: Experience, metrics: dict[str, Array], memory: dict[str, Any], step: Array
) -> tuple[list[Array], dict[str, Any]]:
    """The factor of each loss in this step, and the memory of those that remember something."""
    provided = fields_of(experience) | metrics | {"step": step}
    values, memory = [], dict(memory)
    for term in c.losses:
        value = term.coefficient
        if isinstance(value, Method):
            value, memory[term.memory_name] = call(value, provided, memory[term.memory_name])
        elif callable(value):
            value = call(value, provided)
        values.append(jnp.asarray(value, jnp.float32))
    return values, memory


def learn(
    c: Composition, state: TrainState, experience: Experience, factors: list[Array]
) -> tuple[TrainState, dict[str, Array]]:
    """Experience -> new parameters, and the reference refreshed where that is due."""
    rollout = c.rollout
    update = make_learn(
        c.model,
        c.optimizer,
        c.losses,
        c.update,
        temperature=rollout.temperature,
        samples_per_prompt=rollout.samples_per_prompt,
    )
    key = jax.random.fold_in(jax.random.fold_in(state.key, KeyUse.MINIBATCHES), state.step)
    params, optimizer_state, metrics = update(
        state.params, state.optimizer_state, state.reference_params, experience, factors, key
    )
    for term, factor in zip(c.losses, factors, strict=True):
        if term.coefficient_changes:
            metrics[f"coefficient/{term.name}"] = factor
    state = replace(state, params=params, optimizer_state=optimizer_state, step=state.step + 1)
    return _refreshed(state, c.update), metrics


def sample_and_score(c: Composition, state: TrainState, prompts: Prompts) -> Experience:
    """The first half of a step: what comes before rewards on the host."""
    return score(c, collect(c, state, prompts))


def credit_and_learn(
    c: Composition, state: TrainState, experience: Experience
) -> tuple[TrainState, dict[str, Array], Experience]:
    """The second half of a step: what comes after rewards on the host."""
    sampled = experience.weight
    experience, memory = credit(c, state, experience)
    metrics = experience_metrics(experience, sampled)
    factors, memory = coefficients(c, experience, metrics, memory, state.step)
    state, learned = learn(c, state, experience, factors)
    return constrain_replicated(replace(state, memory=memory), c.mesh), metrics | learned, experience


def whole_step(c: Composition, state: TrainState, prompts: Prompts):
    """collect, score, credit, learn, in one program."""
    return credit_and_learn(c, state, sample_and_score(c, state, prompts))


@dataclass(frozen=True)
class TrainStep:
    """A step that was checked and composed. Calling it: (state, prompts, items=None) -> (state, metrics).

    Attributes:
      init: (key, params=None) -> TrainState.
      run: (state, prompts, items) -> (state, metrics, experience).
      programs: the jitted functions that a step runs, in order; one when every reward is traceable.
      composition: what it was composed of.
    """

    init: Callable[..., TrainState]
    run: Callable[..., tuple[TrainState, dict[str, Array], Experience]]
    programs: tuple[Callable, ...]
    composition: Composition

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
    wanted = wanted_fields(
        reward_terms, credit_terms, loss_terms, samples_per_prompt=rollout.samples_per_prompt, decode=decode
    )
    c = Composition(model, optimizer, rollout, reward_terms, credit_terms, loss_terms, update, wanted, mesh)
    init = jax.jit(partial(initial_state, c))
    if not any(term.on_host for term in reward_terms):
        program = jax.jit(partial(whole_step, c), donate_argnums=0)
        return TrainStep(init, lambda state, prompts, items=None: program(state, prompts), (program,), c)
    programs = (jax.jit(partial(sample_and_score, c)), jax.jit(partial(credit_and_learn, c), donate_argnums=0))
    return TrainStep(init, partial(_run_with_host, programs, reward_terms, decode), programs, c)


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
