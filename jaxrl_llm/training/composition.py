"""What a step is composed of, checked once: every name provided, every part offering what another needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import optax

from jaxrl_llm.experience import FACTS, Method, Selection
from jaxrl_llm.fields import (
    FACTS_READ_ONLY,
    FIELDS,
    fillable,
    kind_of,
    missing,
    name_of,
    names,
    nearest,
    on_host,
    provided_by,
    remedy,
    required,
    score_named,
    signature,
)
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.environments import Environment
from jaxrl_llm.rollout.hand_over import External
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.rollout.plans import Plan, greedy_baseline, plain
from jaxrl_llm.rows import Replay, Written
from jaxrl_llm.training.networks import OFFLOADABLE, POLICY, Network, Placement, has_copy, networks_named


@dataclass(frozen=True)
class Rollout:
    """A source of rows: the policy samples completions of the prompts that a step is handed.

    Attributes:
      samples_per_prompt: completions of each prompt that learn.
      max_completion_tokens: longest completion, end of sequence included.
      eos_ids: tokens that end a completion.
      pad_id: token that fills the rest; may be one of `eos_ids`.
      temperature: of the softmax, above 0; the trainer scores at the same temperature.
      plan: how they are asked for; None draws all at once.
      prompts_per_step: prompts in a batch, if known: sizes that do not divide are then found when the step is built.
      replay_router: a mixture of experts learns through the experts that sampled each token.
      slots: completions that are decoded at a time; None decodes all side by side.
      truncation: top-k, with top-p and min-p within it, of what is sampled. The trainer then computes over the tokens
        that each one could have been, too; None samples from the whole vocabulary.
      off_policy_steps: 1 samples a batch with the policy before the last update (one-step off-policy), 0 with the
        newest.
      environment: what answers the turns of conversations; None where one completion is all.
      engine: an engine in another process that samples in the place of the policy.
      selection: what chooses the prompts of a step; None where the caller does. Needs `prompts_per_step`.
    """

    samples_per_prompt: int
    max_completion_tokens: int
    eos_ids: Sequence[int]
    pad_id: int
    temperature: float = 1.0
    plan: Plan | None = None
    prompts_per_step: int | None = None
    replay_router: bool = False
    slots: int | None = None
    truncation: Controls | None = None
    off_policy_steps: int = 0
    environment: Environment | HostEnvironment | None = None
    engine: External | None = None
    selection: Selection | None = None

    def __post_init__(self):
        if self.truncation is not None and self.truncation.top_k is None:
            raise ValueError(
                "rollout.top_p or rollout.min_p is set without rollout.top_k; training keeps the tokens that each one "
                "was drawn from, so bound their number (for example top_k: 64)"
            )
        if self.off_policy_steps not in (0, 1):
            raise ValueError(f"rollout.off_policy_steps is {self.off_policy_steps}; it must be 0 or 1")
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}; training samples need a temperature above 0 "
                "(greedy decoding is for evaluation)"
            )


@dataclass(frozen=True)
class Reward:
    """One reward function of a recipe: a column of `reward_components`.

    Attributes:
      function: returns one number a row; one that names text runs on the host (`fields.on_host`).
      weight: factor in the sum that is maximised.
      name: for metrics and messages.
      deadline_s: seconds that one call of a reading may take; None waits.
      value_on_failure: the reward where a call fails or takes too long; None ends the step with an error.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    name: str = ""
    deadline_s: float | None = None
    value_on_failure: float | None = None

    @property
    def on_host(self) -> bool:
        """Whether it is a reading."""
        return on_host(self.function)


@dataclass(frozen=True)
class Fill:
    """One entry of a recipe's credit list: names in, one or several names out.

    Attributes:
      fields: the name, or names, that the function's value becomes: an array, or a tuple or a dictionary of them.
      function: a function of named data, a reading, or a `Method`.
      name: for metrics, memory and messages.
      deadline_s, value_on_failure: of a reading, as for `Reward`.
    """

    fields: str | tuple[str, ...]
    function: Callable[..., Any] | Method
    name: str = ""
    deadline_s: float | None = None
    value_on_failure: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it fills."""
        return (self.fields,) if isinstance(self.fields, str) else tuple(self.fields)

    @property
    def on_host(self) -> bool:
        """Whether it is a reading."""
        return on_host(self.function)

    @property
    def over_vocabulary(self) -> bool:
        """Whether it reads whole next-token distributions of the policy before the update."""
        return "log_probabilities" in names(self.function)

    @property
    def memory_name(self) -> str:
        """Key of the method's memory in `TrainState.memory`."""
        return f"{','.join(self.names)}:{self.name}"


@dataclass(frozen=True)
class LossTerm:
    """One loss of a recipe.

    Attributes:
      function: returns a `Loss`.
      coefficient: a number, or a function (or `Method`) of experience fields and metrics that returns one.
      name: for metrics and messages.
    """

    function: Callable[..., Any]
    coefficient: Any = 1.0
    name: str = ""

    @property
    def coefficient_changes(self) -> bool:
        """Whether the coefficient is computed anew in each step."""
        return callable(self.coefficient) or isinstance(self.coefficient, Method)

    @property
    def on_written(self) -> bool:
        """Whether it is a loss on written completions."""
        return "written_mask" in names(self.function)

    @property
    def memory_name(self) -> str:
        """Key of the coefficient's memory in `TrainState.memory`."""
        return f"coefficient:{self.name}"


@dataclass(frozen=True)
class Update:
    """How one batch of experience becomes parameter updates.

    Attributes:
      epochs_per_batch: passes over the batch.
      minibatches_per_epoch: optimiser updates a pass; each takes whole groups.
      sequences_per_microbatch: rows differentiated at once; None takes a whole minibatch.
      freeze_policy_steps: first steps in which only other networks learn.
      alignment_every_steps: steps between two measurements of `alignment`; 0 never measures it.
      alignment_learning_rate: the step size that it is measured for.
    """

    epochs_per_batch: int = 1
    minibatches_per_epoch: int = 1
    sequences_per_microbatch: int | None = None
    freeze_policy_steps: int = 0
    alignment_every_steps: int = 0
    alignment_learning_rate: float = 1e-4


@dataclass(frozen=True)
class Resources:
    """What the functions of a step draw on.

    Attributes:
      decode: token ids -> text, for readings and environments in Python.
      encode: text -> token ids, for environments in Python and views of text.
      networks: beside the policy, by name. A reference is there without being described; networks with a head are, where
        there is a critic.
      critic: optimiser of networks with a head that a name alone brings along.
      views: functions that make another sequence of a row, by name.
      placement: devices.
    """

    decode: Callable[[Sequence[int]], str] | None = None
    encode: Callable[[str], list[int]] | None = None
    networks: Mapping[str, Network] = field(default_factory=dict)
    critic: optax.GradientTransformation | None = None
    views: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    placement: Placement = field(default_factory=Placement)


Source = Rollout | Written | Replay


@dataclass(frozen=True)
class Composition:
    """What a step is composed of. The stages of a step are functions of it and of arrays.

    Attributes:
      model, optimizer: the policy.
      sources: where rows come from.
      rewards, credit, losses: the functions of each stage.
      update: how a batch becomes updates.
      resources: what the functions draw on.
      placed: a sharding for each array of the state; None without a mesh.
    """

    model: Model
    optimizer: optax.GradientTransformation
    sources: tuple[Source, ...]
    rewards: tuple[Reward, ...]
    credit: tuple[Fill, ...]
    losses: tuple[LossTerm, ...]
    update: Update
    resources: Resources
    placed: Any = None

    # ---- sources ----------------------------------------------------------------------------------------------------

    @cached_property
    def rollout(self) -> Rollout | None:
        """The source that samples; None where all rows are written."""
        return next((source for source in self.sources if isinstance(source, Rollout)), None)

    @cached_property
    def written(self) -> Written | None:
        """The source of rows that are handed to a step."""
        return next((source for source in self.sources if isinstance(source, Written)), None)

    @cached_property
    def replay(self) -> Replay | None:
        """The store of rows of earlier steps."""
        return next((source for source in self.sources if isinstance(source, Replay)), None)

    @cached_property
    def plan(self) -> Plan:
        """How completions are asked for, with a greedy baseline where something names its rewards."""
        assert self.rollout is not None
        r = self.rollout
        made = r.plan or plain(samples_per_prompt=r.samples_per_prompt)
        if "baseline_rewards" in self.named and "baseline_rewards" not in made.provides:
            made = greedy_baseline(made, temperature=r.temperature)
        return made

    @property
    def samples(self) -> int:
        """Rows of a group."""
        if self.rollout is not None:
            return self.rollout.samples_per_prompt
        return self.written.rows_per_group if self.written is not None else 1

    @property
    def temperature(self) -> float:
        """Of the policy's log-probabilities."""
        return 1.0 if self.rollout is None else self.rollout.temperature

    @property
    def joined_groups(self) -> int:
        """Groups that learn beside those that were sampled in the step."""
        if self.rollout is None:
            return 0
        return (self.written.groups if self.written else 0) + (self.replay.groups if self.replay else 0)

    # ---- names ------------------------------------------------------------------------------------------------------

    @cached_property
    def functions(self) -> tuple[Any, ...]:
        """All functions of the step, coefficients among them."""
        fills = [term.function for term in (*self.rewards, *self.credit, *self.losses)]
        return (*fills, *(t.coefficient for t in self.losses if t.coefficient_changes), *self.resources.views.values())

    @cached_property
    def named(self) -> frozenset[str]:
        """Every name that some function cannot do without. What is optional is never computed for its own sake."""
        asked = required(self.functions)
        if self.rollout is not None and self.rollout.plan is not None and "demonstrations" in self.rollout.plan.needs:
            asked |= provided_by("data")
        if "kl_reference_per_token" in asked:
            asked |= {"reference_logprobs"}
        if self.rollout is not None and self.rollout.engine is not None:
            asked |= {"old_logprobs", "old_entropy"}
        return asked

    @cached_property
    def networks(self) -> dict[str, Network]:
        """Networks beside the policy that something names, each after the one that it is made from."""
        given = self.resources
        return networks_named(self.named, given.networks, given.views, given.critic)

    @cached_property
    def wanted(self) -> frozenset[str]:
        """Names that the step computes before the update because something names them."""
        filled = {name for term in self.credit for name in term.names}
        by_rule = {
            name for name in self.named - FIELDS.keys() - filled if self.score(name) is not None and self.before(name)
        }
        return by_rule | (self.named & (provided_by("network", "data", "greedy_baseline") | {"token_reward_logits"}))

    def score(self, name: str) -> Any:
        """What a rule-made name asks for; None for another name."""
        return score_named(name, [POLICY, *self.networks], self.resources.views)

    def before(self, name: str) -> bool:
        """Whether a rule-made name is of a network as the step found it, wherever it is named."""
        found = self.score(name)
        if found.as_found or found.network not in self.learning:
            return True
        return name in required([t.function for t in (*self.rewards, *self.credit)])

    @cached_property
    def learning(self) -> frozenset[str]:
        """Networks whose parameters the losses change."""
        read = required([t.function for t in self.losses])
        policy = read & {"logprobs", "entropy", "over_vocabulary", "router_probabilities"}
        views = {s.view for name in read if (s := self.score(name)) and s.network == POLICY and not s.as_found}
        heads = {
            s.network
            for name in read
            if (s := self.score(name)) and not s.as_found and s.network in self.networks
            if self.networks[s.network].optimizer is not None
        }
        return frozenset(heads | ({POLICY} if policy or views else set()))

    @cached_property
    def with_reference(self) -> bool:
        """Whether something compares the policy with a reference."""
        return "reference" in self.networks

    @property
    def copies_reference(self) -> bool:
        """Whether the state holds a copy for the reference. A policy with adapters can have its base as one."""
        return self.with_reference and has_copy(self.model, self.networks["reference"])

    @property
    def keeps_record(self) -> bool:
        """Whether the sampler's own record stands for the log-probabilities of the policy before the update.

        Samples of the policy before it are taken for its own too, as PPO does, unless something tells the two apart.
        """
        r = self.rollout
        if r is None or r.engine is not None:
            return False
        exact = "one_temperature" not in self.plan.lacks - self._greedy_lacks
        exact &= getattr(self.model.config, "cache_dtype", "compute") == "compute"
        told = any("behaviour_logprobs" in names(t.function) for t in (*self.credit, *self.losses))
        return exact and not (r.off_policy_steps and told)

    @property
    def _greedy_lacks(self) -> frozenset[str]:
        # The greedy rows have left when the others are scored.
        return frozenset({"one_temperature"}) if "extra" not in self.plan.provides else frozenset()

    @property
    def equal_groups(self) -> bool:
        """Whether each `samples` rows that follow one another are those of one prompt."""
        return self.rollout is not None and "equal_groups" not in self.plan.lacks

    @cached_property
    def stateful(self) -> dict[str, Method]:
        """Methods that remember something, by the name of their memory."""
        methods = {t.memory_name: t.function for t in self.credit if isinstance(t.function, Method)}
        return methods | {t.memory_name: t.coefficient for t in self.losses if isinstance(t.coefficient, Method)}


# ---- checks ---------------------------------------------------------------------------------------------------------

# What samplers offer, and how a message says what is missing.
CAPABILITIES = {
    "one_round": "rows that come in one round",
    "one_temperature": "rows of one temperature",
    "one_group_a_prompt": "one group of each prompt",
    "equal_groups": "groups of one size",
    "drawn_by_policy": "tokens that the policy drew",
    "whole_vocabulary": "tokens drawn from the whole vocabulary",
    "recorded_router": "experts recorded for every row",
    "active_prompts": "sampling of some prompts alone",
    "numbered_samples": "samples numbered from where the last round ended",
    "uneven_groups": "groups of different sizes",
    "prefixes": "completions that start with given tokens",
    "temperatures": "a temperature for each sample number",
    "demonstrations": "reference completions of the prompts",
    "router_record": "a record of the experts that served each token",
    "slots": "decoding in slots",
    "truncation": "truncated sampling",
}
_SHAPES = frozenset(
    {"one_round", "one_temperature", "one_group_a_prompt", "equal_groups", "drawn_by_policy", "whole_vocabulary"}
    | {"recorded_router"}
)
_SAMPLERS = {
    "the sampler": frozenset(CAPABILITIES) - _SHAPES,
    "the environment inside the program": frozenset(
        {"active_prompts", "numbered_samples", "temperatures", "demonstrations"}
    ),
    "the environment in Python": frozenset({"numbered_samples", "demonstrations"}),
    "rollout.engine": frozenset({"numbered_samples", "demonstrations", "truncation"}),
}


def require(part: str, needs: frozenset[str], by: str, offers: frozenset[str]) -> None:
    """Raises ValueError where a part needs what another does not offer, saying which and what would do."""
    for capability in sorted(needs - offers):
        raise ValueError(
            f"{part} needs {CAPABILITIES[capability]} ({capability}), which {by} does not offer; leave {part} out, or "
            f"replace {by}"
        )


def checked(c: Composition) -> Composition:
    """The composition, if every name is provided and every part offers what another needs.

    Raises:
      ValueError: naming the part, the name or capability, and what would do.
    """
    if not c.losses:
        raise ValueError("losses is empty; a step needs at least one loss function")
    if c.rollout is not None and not c.rewards:
        raise ValueError("rewards is empty; a step needs at least one reward function")
    if not c.sources:
        raise ValueError("source is empty; a step needs rows: a Rollout, Written or Replay")
    if c.rollout is None and c.replay is not None:
        raise ValueError("source is a replay store alone; it keeps rows that a Rollout has sampled, so name one too")
    for kind, terms in (("reward", c.rewards), ("loss", c.losses)):
        seen = [term.name for term in terms]
        if twice := {name for name in seen if seen.count(name) > 1}:
            raise ValueError(f"{kind} {twice.pop()!r} is listed twice; give each a name of its own (name: ...)")
    _check_names(c)
    _check_capabilities(c)
    _check_rest(c)
    return c


def available_before_rewards(c: Composition) -> frozenset[str]:
    """Names that rows know before they are scored."""
    given = set(FACTS) | {"step"}
    given -= {"support", "router_choices"}
    r = c.rollout
    if r is not None:
        given |= provided_by("data") | c.plan.provides - {"baseline_rewards", "label", "pool_mean", "pool_count"}
        if r.environment is not None:
            given |= provided_by("environment")
        if r.engine is not None:
            given |= provided_by("engine")
        if r.replay_router:
            given |= {"router_choices"}
        if r.truncation is not None:
            given |= {"support"}
    if c.written is not None:
        given |= c.written.provides | {"written_mask"}
    return frozenset(given)


def _check_names(c: Composition) -> None:
    by_network = {name for name in c.named if c.score(name) is not None}
    by_network |= {"hidden", "prompt_logprobs", "prompt_mask"}
    learner = provided_by("learner") | {"router_choices"}
    text = provided_by("text") | {"items"}
    available = available_before_rewards(c)
    # What stands for a name that is spelled wrongly, beside what is there.
    scored = frozenset(by_network - learner)
    known = frozenset({"reference_logprobs", "old_logprobs", "old_entropy", *scored})
    heads = known | ({"old_values"} if c.resources.critic is not None else set())
    for name, view in c.resources.views.items():
        _require_names(view, f"view {name!r}", available | text)
    for term in c.rewards:
        _require_names(term.function, f"reward {term.name!r}", available | text, scored - {"logprobs", "entropy"})
        if term.on_host and c.resources.decode is None and names(term.function) & text:
            raise ValueError(f"reward {term.name!r} reads text, so make_train_step needs decode= (token ids -> text)")
    if c.rewards:
        available |= provided_by("rewards")
    if c.rollout is not None:
        available |= c.plan.provides
    readers = [*(t.function for t in c.losses), *(t.coefficient for t in c.losses if t.coefficient_changes)]
    for index, term in enumerate(c.credit):
        later = [*(t.function for t in c.credit[index + 1 :]), *readers, *c.resources.views.values()]
        for name in term.names:
            if name in FACTS_READ_ONLY or c.score(name) is not None:
                raise ValueError(f"credit fills {name!r}, which it cannot; {nearest(name, fillable())}")
            if name not in FIELDS and not any(name in names(function) for function in later):
                raise ValueError(f"credit fills {name!r}, which nothing after it reads; {nearest(name, fillable())}")
        what = f"{', '.join(term.names)} {term.name!r}"
        if term.over_vocabulary:
            _require_names(term.function, what, frozenset({"log_probabilities", "tokens"}))
        else:
            _require_names(term.function, what, available | (text if term.on_host else frozenset()), heads)
        if c.samples == 1 and "advantages" in term.names and "group" in names(term.function):
            raise ValueError(
                f"rollout.samples_per_prompt is 1, but {term.name!r} compares the samples of a prompt, so every "
                "advantage would be 0; use at least 2 samples or a baseline that needs no group"
            )
        available |= set(term.names)
    remembering = [term.memory_name for term in c.credit if isinstance(term.function, Method)]
    if twice := {name for name in remembering if remembering.count(name) > 1}:
        raise ValueError(
            f"credit entry {twice.pop()!r} is listed twice and remembers something, so both would share one memory; "
            "leave one out, or give each Fill a name of its own"
        )
    for term in c.losses:
        _require_names(term.function, f"loss {term.name!r}", available | learner, heads | {"values"})
        if not c.model.routed and (
            asked := sorted({"router_choices", "router_probabilities"} & required([term.function]))
        ):
            raise ValueError(
                f"loss {term.name!r} names {asked[0]!r}, but the model is no mixture of experts; leave the loss out"
            )
        if term.coefficient_changes:
            metrics = provided_by("metrics") - ({"alignment"} if not c.update.alignment_every_steps else set())
            _require_names(term.coefficient, f"coefficient of {term.name!r}", available | metrics, heads)


def _require_names(function: Any, what: str, available: frozenset[str], scored: frozenset[str] = frozenset()) -> None:
    for name in missing(function, available | scored):
        raise ValueError(
            f"{what} names {name!r}, which nothing in this step provides; {remedy(name, available | scored)}"
        )


def _check_capabilities(c: Composition) -> None:
    r = c.rollout
    if r is None:
        return
    sampler, offers = _sampler_of(r)
    plan = "rollout.plan" if r.plan is not None else "the greedy baseline ('baseline_rewards')"
    rows = _SHAPES - c.plan.lacks
    require(plan, c.plan.needs - _SHAPES, sampler, offers)
    for name, wanted, capability in (
        ("rollout.replay_router", r.replay_router, "router_record"),
        ("rollout.slots", r.slots is not None, "slots"),
        ("rollout.truncation", r.truncation is not None, "truncation"),
    ):
        if wanted:
            require(name, frozenset({capability}), sampler, offers)
    joined = [name for name, source in (("written rows", c.written), ("replay", c.replay)) if source is not None]
    if r.replay_router:
        require("rollout.replay_router", frozenset({"drawn_by_policy"}), "rollout.plan", rows)
        for name in joined:
            require("rollout.replay_router", frozenset({"recorded_router"}), name, frozenset())
    if r.truncation is not None:
        require("rollout.truncation", frozenset({"drawn_by_policy"}), "rollout.plan", rows)
        for name in joined:
            require("rollout.truncation", frozenset({"drawn_by_policy"}), name, frozenset())
        whole = [t.name for t in c.credit if t.over_vocabulary]
        whole += [t.name for t in c.losses if "over_vocabulary" in names(t.function)]
        for name in whole:
            require(repr(name), frozenset({"whole_vocabulary"}), "rollout.truncation", frozenset())
    for name in joined:
        require(name, frozenset({"equal_groups"}), "rollout.plan", rows)
    whole = [term.name for term in c.losses if "group" in names(term.function)]
    if whole and (c.update.minibatches_per_epoch > 1 or c.update.sequences_per_microbatch is not None):
        require(
            f"loss {whole[0]!r} in minibatches or microbatches, which hold whole groups,",
            frozenset({"equal_groups"}),
            "rollout.plan",
            rows,
        )
    if r.engine is not None and jax.process_count() > 1:
        raise ValueError(
            f"rollout.engine is set in a run of {jax.process_count()} processes, which would all ask for the same "
            "completions; run the trainer in one process, or leave rollout.engine out"
        )
    if r.engine is not None and r.off_policy_steps:
        raise ValueError(
            "rollout.off_policy_steps is 1, but an engine's policy is as old as rollout.engine.reload_every_steps says; "
            "leave off_policy_steps out"
        )


def _sampler_of(r: Rollout) -> tuple[str, frozenset[str]]:
    if r.engine is not None:
        name = "rollout.engine"
    elif r.environment is None:
        name = "the sampler"
    else:
        name = f"the environment {'in Python' if isinstance(r.environment, HostEnvironment) else 'inside the program'}"
    return name, _SAMPLERS[name]


def _check_rest(c: Composition) -> None:
    r, update, place = c.rollout, c.update, c.resources.placement
    if r is not None:
        for name, token in (*(("eos_ids", each) for each in r.eos_ids), ("pad_id", r.pad_id)):
            if not 0 <= token < c.model.vocabulary_size:
                raise ValueError(
                    f"rollout.{name} is {getattr(r, name)}, but the model's symbols are 0 to "
                    f"{c.model.vocabulary_size - 1}; take the id from the tokenizer that made the prompts"
                )
        if r.replay_router and not c.model.routed:
            raise ValueError(
                "rollout.replay_router is true, but the model is no mixture of experts; leave it out, or set "
                "model.experts"
            )
        if isinstance(r.environment, HostEnvironment) and (c.resources.decode is None or c.resources.encode is None):
            raise ValueError(
                "an environment in Python reads and writes text, so make_train_step needs decode= and encode="
            )
        if r.prompts_per_step is not None:
            groups = r.prompts_per_step + c.plan.extra_groups(r.prompts_per_step)
            checked_split(c, groups)
    held_out = c.written is not None and "validation" in c.written.provides
    if update.alignment_every_steps and not (held_out and any(t.on_written for t in c.losses)):
        raise ValueError(
            f"training.alignment_every_steps is {update.alignment_every_steps}, but alignment compares a loss on "
            "written completions with the others, on held-out ones; add source: {demonstrations: {validation: true}} "
            "and losses: stored_likelihood"
        )
    for name, network in c.networks.items():
        if network.decay is not None and c.model.trained is not None and network.origin == POLICY:
            raise ValueError(
                f"networks.{name}.decay is {network.decay}, but the policy has adapters, whose moving average is not "
                "that of the matrices they stand for; leave it out, or use copy_every"
            )
        other = network.model
        if other is not None and network.head is None and other.vocabulary_size != c.model.vocabulary_size:
            raise ValueError(
                f"networks.{name} has {other.vocabulary_size} symbols, but the policy has {c.model.vocabulary_size}; a "
                "network that scores the policy's tokens needs its vocabulary"
            )
    if unknown := sorted(place.offload - set(OFFLOADABLE)):
        raise ValueError(f"training.offload names {unknown[0]!r}; it can name {', '.join(OFFLOADABLE)}")
    if place.offload and place.mesh is None:
        raise ValueError(
            f"offload is {sorted(place.offload)} without a mesh; pass mesh=make_mesh(), which may be of one device"
        )
    if "reference" in place.offload and not c.copies_reference:
        raise ValueError(
            "training.offload names reference, but the step keeps no copy of a reference policy; leave it out"
        )


def checked_split(c: Composition, prompts: int) -> int:
    """Microbatches in a minibatch.

    Args:
      c: with losses that compare the rows of a group, which want whole groups.
      prompts: groups that were sampled, or written where nothing is sampled.

    Raises:
      ValueError: when the batch does not divide as the update asks.
    """
    update, samples, joined = c.update, c.samples, c.joined_groups
    for count, name in ((prompts, "training.prompts_per_step"), (joined, "the number of groups of written rows")):
        if count % update.minibatches_per_epoch:
            raise ValueError(
                f"training.minibatches_per_epoch is {update.minibatches_per_epoch}, which does not divide "
                f"{name} {count}; minibatches hold whole groups, so choose a divisor of {count}"
            )
    rows = (prompts + joined) * samples // update.minibatches_per_epoch
    size = update.sequences_per_microbatch or rows
    if rows % size:
        written = f" and {joined * samples} written rows" if joined else ""
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, which does not divide the {rows} sequences of a minibatch "
            f"({prompts} prompts x {samples} samples{written} / {update.minibatches_per_epoch} minibatches); "
            "choose a divisor"
        )
    whole = [term.name for term in c.losses if "group" in names(term.function)]
    if whole and size % samples:
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, but loss {whole[0]!r} compares the samples of a prompt, so "
            f"a microbatch must hold whole groups: choose a multiple of rollout.samples_per_prompt {samples}"
        )
    return rows // size


# ---- terms ----------------------------------------------------------------------------------------------------------


def reward_term(term: Reward | Callable[..., Any] | tuple[Callable[..., Any], float]) -> Reward:
    """A reward function, or (function, weight), as a term."""
    if isinstance(term, Reward):
        return term if term.name else replace(term, name=name_of(term.function))
    function, weight = term if isinstance(term, tuple) else (term, 1.0)
    return Reward(function, weight, name_of(function))


def fill_term(term: Fill | tuple[Any, Any]) -> Fill:
    """A (name or names, function) pair as a term."""
    if isinstance(term, Fill):
        return term if term.name else replace(term, name=name_of(term.function))
    return Fill(term[0], term[1], name_of(term[1]))


def loss_term(term: Any) -> LossTerm:
    """A loss function, or (function, coefficient), as a term."""
    if isinstance(term, LossTerm):
        return term if term.name else replace(term, name=name_of(term.function))
    function, coefficient = term if isinstance(term, tuple) and not callable(term) else (term, 1.0)
    return LossTerm(function, coefficient, name_of(function))


__all__ = [
    "Composition",
    "Fill",
    "LossTerm",
    "Resources",
    "Reward",
    "Rollout",
    "Update",
    "checked",
    "checked_split",
    "kind_of",
    "signature",
]
