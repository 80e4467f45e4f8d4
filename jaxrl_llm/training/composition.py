"""The composition of a step: its functions and resources, and the names, networks and views derived from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import optax

from jaxrl_llm.experience import Method
from jaxrl_llm.fields import FIELDS, provided_by
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.stored_distributions import stored_distributions
from jaxrl_llm.network_names import compared_with, score_named
from jaxrl_llm.rollout.plans import Plan, greedy_baseline, plain
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.rows import Hardest, Replay, Written
from jaxrl_llm.signatures import names, required
from jaxrl_llm.terms import Fill, LossTerm, Reward, Update, View, fill_term, listed, loss_term, reward_term
from jaxrl_llm.training.networks import FILE, POLICY, ROWS, Network, has_copy, networks_named
from jaxrl_llm.training.segments import Placement


@dataclass(frozen=True)
class Resources:
    """Resources for the functions of a step.

    Attributes:
      decode: token ids -> text, for readings and environments in Python.
      encode: text -> token ids, for environments in Python.
      networks: networks beside the policy, by name. A reference needs no description, nor do networks with a head if
        `critic` is given.
      critic: optimiser of networks with a head that are created without a description.
      views: functions that make another sequence of a row, by name; a `View` adds call settings.
      columns: columns of the data outside of the table, which readings may read.
      sources: names of the sources of a mixture of data, for metrics of each.
      diagnostics: whether each step also measures relations between rewards, and degenerate completions.
      scripts: script of each token of the vocabulary (`data.token_scripts`), for the share of completions in a foreign
          script.
      placement: devices and shardings.
    """

    decode: Callable[[Sequence[int]], str] | None = None
    encode: Callable[[str], list[int]] | None = None
    networks: Mapping[str, Network] = field(default_factory=dict)
    critic: optax.GradientTransformation | None = None
    views: Mapping[str, View | Callable[..., Any]] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()
    sources: tuple[str, ...] = ()
    diagnostics: bool = False
    scripts: Any = None
    placement: Placement = field(default_factory=Placement)


Source = Rollout | Written | Replay | Hardest


@dataclass(frozen=True)
class Composition:
    """The parts of a step. The stages of a step are functions of it and of arrays.

    Attributes:
      model, optimizer: the policy.
      sources: sources of rows.
      rewards, credit, losses: the functions of each stage.
      update: epochs, minibatches and microbatches.
      resources: text, networks, views, devices.
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
        """The source that samples; None if all rows are written."""
        return next((source for source in self.sources if isinstance(source, Rollout)), None)

    @cached_property
    def written(self) -> Written | None:
        """The source of rows passed by the caller."""
        return next((source for source in self.sources if isinstance(source, Written)), None)

    @cached_property
    def replay(self) -> Replay | None:
        """The store of rows of earlier steps."""
        return next((source for source in self.sources if isinstance(source, Replay)), None)

    @cached_property
    def hardest(self) -> Hardest | None:
        """The store of demonstrations of unsolved prompts."""
        return next((source for source in self.sources if isinstance(source, Hardest)), None)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the rollout, with a greedy baseline if a function reads `baseline_rewards`."""
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
        """Temperature of the policy's log-probabilities."""
        return 1.0 if self.rollout is None else self.rollout.temperature

    @property
    def joined_groups(self) -> int:
        """Number of groups added to those sampled in the step."""
        if self.rollout is None:
            return 0
        return sum(source.groups for source in (self.written, self.replay, self.hardest) if source is not None)

    # ---- names ------------------------------------------------------------------------------------------------------

    @cached_property
    def functions(self) -> tuple[Any, ...]:
        """All functions of the step, including coefficients."""
        fills = [term.function for term in (*self.rewards, *self.credit, *self.losses)]
        views = [view.function for view in self.views.values()]
        return (*fills, *(t.coefficient for t in self.losses if t.coefficient_changes), *views)

    @cached_property
    def views(self) -> dict[str, View]:
        """The views by name."""
        given = self.resources.views
        return {name: replace(v if isinstance(v, View) else View(v), name=name) for name, v in given.items()}

    @cached_property
    def named(self) -> frozenset[str]:
        """Every name that at least one function requires. Optional names are not computed on their own."""
        asked = required(self.functions)
        if self.rollout is not None and self.rollout.plan is not None:
            asked |= self.rollout.plan.reads
        if self.hardest is not None:
            asked |= {"demonstration_tokens", "demonstration_length"}
        if "kl_reference_per_token" in asked:
            asked |= {"reference_logprobs"}
        if self.rollout is not None and self.rollout.engine is not None:
            asked |= {"old_logprobs", "old_entropy"}
        return asked

    @cached_property
    def networks(self) -> dict[str, Network]:
        """Networks beside the policy that some function reads, each after its origin."""
        given = self.resources
        writers = {name for view in self.views.values() for name in view.asked}
        known = dict(given.networks)
        if self.written is not None and "top_tokens" in self.written.provides:
            known[FILE] = Network(origin=ROWS, model=stored_distributions(self.model.vocabulary_size))
        brought = self.written.provides if self.written is not None and self.rollout is None else frozenset()
        if "reference_logprobs" in brought and "reference" in known and known["reference"].moves:
            raise ValueError(
                "networks.reference follows the policy, but the rows of the source have reference_logprobs of their "
                "own; leave one of them out"
            )
        return networks_named(self.named - brought, known, self.views, given.critic, writers)

    @cached_property
    def wanted(self) -> frozenset[str]:
        """Names that the step computes before the update because a function reads them."""
        filled = {name for term in self.credit for name in term.names}
        # A name of the table that credit may fill refers to a network if a network of that name exists.
        other = (FIELDS.keys() - provided_by("credit")) | filled
        by_rule = {name for name in self.named - other if self.score(name) is not None and self.before(name)}
        brought = provided_by("network", "data", "greedy_baseline") | {"token_reward_logits"}
        brought |= self.view_masks | self.written_texts | self.written_tokens
        return frozenset(by_rule) | (self.named & brought)

    @property
    def view_masks(self) -> frozenset[str]:
        """Names of the masks of views."""
        return frozenset(f"{view}_mask" for view in self.views)

    @property
    def written_texts(self) -> frozenset[str]:
        """Names of the texts that networks generate."""
        return frozenset(f"{name}_text" for name, view in self.views.items() if view.written_by)

    @property
    def written_tokens(self) -> frozenset[str]:
        """Names of the tokens that networks write, and of their lengths."""
        written = [name for name, view in self.views.items() if view.written_by]
        return frozenset(f"{name}_{part}" for name in written for part in ("tokens", "length")) - FIELDS.keys()

    def view_of(self, name: str) -> str:
        """The view that a name refers to; "" for any other name."""
        found = self.score(name)
        if found is not None:
            return found.view
        if name in self.view_masks | self.written_texts | self.written_tokens:
            return name.rpartition("_")[0]
        return ""

    def made_of(self, view: str, behind: tuple[str, ...] = ()) -> frozenset[str]:
        """Names of rows that a view is made of; of what other views hold, the names that those are made of.

        Raises:
          ValueError: for views that are made of each other.
        """
        if view in behind:
            raise ValueError(f"views {', '.join(behind)} are made of each other; make one of them of the row alone")
        found = self.views[view].needs - self.resources.columns
        others = {name: other for name in found if (other := self.view_of(name))}
        return (found - others.keys()).union(*(self.made_of(other, (*behind, view)) for other in others.values()))

    def views_of(self, names: Collection[str]) -> tuple[str, ...]:
        """The views that names are about, each behind those that it is made of."""
        ordered: dict[str, None] = {}
        for view in dict.fromkeys(view for name in sorted(names) if (view := self.view_of(name))):
            ordered |= dict.fromkeys((*self.views_of(self.views[view].needs), view))
        return tuple(ordered)

    def score(self, name: str) -> Any:
        """The meaning of a name that follows the rules of `network_names`; None for any other name."""
        return score_named(name, [POLICY, *self.networks], self.views)

    def before(self, name: str) -> bool:
        """Whether a network's name always refers to the parameters at the start of the step, also in a loss."""
        found = self.score(name)
        if found.as_found or found.network not in self.learning:
            return True
        return name in required([t.function for t in (*self.rewards, *self.credit)])

    @cached_property
    def learning(self) -> frozenset[str]:
        """Networks whose parameters the losses change."""
        read = required([t.function for t in self.losses])
        policy = read & provided_by("learner") or [name for name in read if compared_with(name) is not None]
        views = {s.view for name in read if (s := self.score(name)) and s.network == POLICY and not s.as_found}
        heads = {
            s.network
            for name in read
            if (s := self.score(name)) and not s.as_found and s.network in self.networks
            if self.networks[s.network].optimizer is not None
        }
        shared = {name for name in heads if self.networks[name].head and self.networks[name].backbone == "shared"}
        return frozenset(heads | ({POLICY} if policy or views or shared else set()))

    @cached_property
    def with_reference(self) -> bool:
        """Whether a function compares the policy with a reference."""
        return "reference" in self.networks

    @property
    def copies_reference(self) -> bool:
        """Whether the state holds a copy for the reference. For a policy with adapters, the base can be the
        reference."""
        return self.with_reference and has_copy(self.model, self.networks["reference"])

    @property
    def keeps_record(self) -> bool:
        """Whether the sampler's log-probabilities are used as those of the policy before the update.

        Samples of an earlier policy count too, as in PPO, unless a function distinguishes the two.
        """
        r = self.rollout
        if r is None or r.engine is not None:
            return False
        exact = not self.plan.lacks & {"one_temperature", "own_prompt"}
        exact &= getattr(self.model.config, "cache_dtype", "compute") == "compute"
        told = any("behaviour_logprobs" in names(t.function) for t in (*self.credit, *self.losses))
        return exact and not (r.off_policy_steps and told)

    @property
    def equal_groups(self) -> bool:
        """Whether every `samples` consecutive rows belong to one prompt."""
        return self.rollout is not None and "equal_groups" not in self.plan.lacks

    @cached_property
    def stateful(self) -> dict[str, Method]:
        """Methods with a memory, by the name of their memory."""
        methods = {t.memory_name: t.function for t in self.credit if isinstance(t.function, Method)}
        return methods | {t.memory_name: t.coefficient for t in self.losses if isinstance(t.coefficient, Method)}


def composition_of(
    model: Model,
    optimizer: optax.GradientTransformation,
    source: Source | Sequence[Source],
    rewards: Sequence[Any],
    credit: Sequence[Any],
    losses: Sequence[Any],
    update: Update | None,
    resources: Resources | None,
) -> Composition:
    """An unchecked composition from the arguments of `make_train_step`."""
    return Composition(
        model,
        optimizer,
        tuple(source) if isinstance(source, Sequence) else (source,),
        listed("rewards", rewards, reward_term),
        listed("credit", credit, fill_term),
        listed("losses", losses, loss_term),
        update or Update(),
        resources or Resources(),
    )
