"""What a step is composed of: how completions are sampled, and the parts of everything after it, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from jaxrl_llm.experience import Method
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import RULES, Rules
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.host_turns import HostTurns
from jaxrl_llm.rollout.round_options import Adaptive, Budget, Refill
from jaxrl_llm.training.conversations import AnyEnvironment
from jaxrl_llm.training.credit import CreditTerm
from jaxrl_llm.training.critics import Critic, critics_named
from jaxrl_llm.training.external_engine import (
    External,
)
from jaxrl_llm.training.learn import LossTerm, Update
from jaxrl_llm.training.rows import (
    Extra,
)
from jaxrl_llm.training.score import RewardTerm
from jaxrl_llm.training.stored import (
    Replay,
    StoredRows,
)
from jaxrl_llm.training.wiring import names, signature


@dataclass(frozen=True)
class Rollout:
    """How completions are sampled.

    Attributes:
      samples_per_prompt: completions drawn for each prompt.
      max_completion_tokens: longest completion, end of sequence included.
      eos_ids: tokens that end a completion.
      pad_id: token that fills the rest; may be one of `eos_ids`.
      temperature: of the softmax, above 0; the trainer scores at the same temperature.
      demonstration_in_group: the last sample of each group is the prompt's reference completion.
      prefixes: token ids that completions start with, one tuple for each equal block of a prompt's samples; they are
        hints, not trained on.
      extra: groups sampled on top at another temperature.
      replay_router: a mixture of experts learns through the experts that sampled each token.
      slots: completions that are decoded at a time; None decodes all side by side.
      rounds: sampling in several rounds, or in groups of different sizes; see `rounds`.
      truncation: top-k, with top-p and min-p within it, of what is sampled. The trainer then computes over the tokens
        that each one could have been, too; None samples from the whole vocabulary.
      off_policy_steps: 1 samples a batch with the policy before the last update (one-step off-policy), 0 with the
        newest.
      environment: what answers the turns of conversations; None where one completion is all.
    """

    samples_per_prompt: int
    max_completion_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    demonstration_in_group: bool = False
    prefixes: tuple[tuple[int, ...], ...] = ()
    extra: Extra | None = None
    replay_router: bool = False
    slots: int | None = None
    rounds: Refill | Adaptive | Budget | None = None
    truncation: Controls | None = None
    off_policy_steps: int = 0
    environment: AnyEnvironment | None = None

    def __post_init__(self):
        if self.truncation is not None and self.truncation.top_k is None:
            raise ValueError(
                "rollout.top_p or rollout.min_p is set without rollout.top_k; training keeps the tokens that each one "
                "was drawn from, so bound their number (for example top_k: 64)"
            )
        if self.truncation is not None and (self.demonstration_in_group or self.prefixes):
            name = "demonstration_in_group" if self.demonstration_in_group else "prefixes"
            raise ValueError(
                f"rollout.top_k is set together with rollout.{name}, whose tokens nobody drew; leave one of them out"
            )
        if self.off_policy_steps not in (0, 1):
            raise ValueError(f"rollout.off_policy_steps is {self.off_policy_steps}; it must be 0 or 1")
        if self.rounds is not None:
            self._check_rounds(self.rounds)
        if self.prefixes and self.samples_per_prompt % len(self.prefixes):
            raise ValueError(
                f"rollout.prefixes has {len(self.prefixes)} texts, which do not divide rollout.samples_per_prompt "
                f"{self.samples_per_prompt} into equal blocks; take a multiple"
            )
        longest = max(map(len, self.prefixes), default=0)
        if longest >= self.max_completion_tokens:
            raise ValueError(
                f"rollout.prefixes holds a text of {longest} tokens, which leaves nothing of "
                f"rollout.max_completion_tokens {self.max_completion_tokens}; shorten it or raise the limit"
            )
        if self.demonstration_in_group and self.samples_per_prompt < 2:
            raise ValueError(
                f"rollout.demonstration_in_group is true with rollout.samples_per_prompt {self.samples_per_prompt}; "
                "the demonstration is one of them, so use at least 2"
            )
        if self.demonstration_in_group and self.prefixes:
            raise ValueError(
                "rollout.demonstration_in_group is true and rollout.prefixes is set; a reference completion has no "
                "prefix, so leave one of them out"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}; training samples need a temperature above 0 "
                "(greedy decoding is for evaluation)"
            )

    def _check_rounds(self, rounds: Refill | Adaptive | Budget) -> None:
        name = f"rollout.{type(rounds).__name__.lower()}"
        others = {
            "rollout.demonstration_in_group": self.demonstration_in_group,
            "rollout.prefixes": bool(self.prefixes),
            "rollout.extra": self.extra is not None,
            "rollout.replay_router": self.replay_router,
            "rollout.off_policy_steps": bool(self.off_policy_steps),
        }
        if given := [other for other, value in others.items() if value]:
            raise ValueError(
                f"{name} and {given[0]} are both set, but only plain samples are drawn in rounds; drop one"
            )
        if isinstance(rounds, Adaptive) and rounds.max_rounds * rounds.samples_per_round < self.samples_per_prompt:
            raise ValueError(
                f"rollout.samples_per_prompt is {self.samples_per_prompt}, but {name} draws at most "
                f"{rounds.max_rounds} x {rounds.samples_per_round} samples of a prompt; keep fewer or draw more"
            )
        if isinstance(rounds, Budget) and not rounds.least <= self.samples_per_prompt <= rounds.most:
            raise ValueError(
                f"rollout.samples_per_prompt is {self.samples_per_prompt}, but {name} has least {rounds.least} and "
                f"most {rounds.most}; it is the mean and must lie between them"
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
      mesh: devices that the step runs on, or None.
      rules: from the names of axes to those of the mesh.
      gather_for_rollout: sampling reads weights that are gathered once, not for each token.
      offload: what is kept in the host's memory between its uses, keys of `OFFLOADED`.
      placed: a sharding for each array of the state; None without a mesh.
      critic: how value models and their like are made.
      stored: rows that every step is handed beside the prompts.
      replay: learning again from rows of earlier steps.
      external: an engine that samples in the place of `collect`.
      turns: programs of conversations whose environment is in Python, in the place of `collect` too.
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
    critic: Critic | None = None
    stored: StoredRows | None = None
    replay: Replay | None = None
    external: External | None = None
    rules: Rules = field(default_factory=lambda: RULES)
    gather_for_rollout: bool = True
    offload: frozenset[str] = frozenset()
    placed: Any = None
    turns: HostTurns | None = None

    @property
    def joined_groups(self) -> int:
        """Groups that learn without having been sampled in the step."""
        return (self.stored.groups if self.stored else 0) + (self.replay.groups if self.replay else 0)

    @property
    def critics(self) -> tuple[str, ...]:
        """Names of the critics that something asks for."""
        everything = [t.function for t in (*self.credit, *self.losses)]
        return critics_named(frozenset().union(*(signature(f).required for f in everything)))

    @property
    def equal_groups(self) -> bool:
        """Whether each `samples_per_prompt` rows that were sampled one after the other are those of one prompt."""
        return not isinstance(self.rollout.rounds, Budget)

    @property
    def keeps_record(self) -> bool:
        """Whether the sampler's own record stands for the log-probabilities of the policy before the update.

        Samples of the policy before it are taken for its own too, as PPO does, unless something tells the two apart.
        """
        r, functions = self.rollout, [t.function for t in (*self.credit, *self.losses)]
        exact = r.extra is None and getattr(self.model.config, "cache_dtype", "compute") == "compute"
        return exact and not (r.off_policy_steps and any("behaviour_logprobs" in names(f) for f in functions))

    @property
    def with_reference(self) -> bool:
        """Whether something compares the policy with a reference."""
        return "reference_logprobs" in self.wanted or any("over_vocabulary" in names(t.function) for t in self.losses)

    @property
    def copies_reference(self) -> bool:
        """Whether the state holds a copy for the reference. A policy with adapters can have its base as one."""
        needed = self.model.trained is None or self.update.snapshot_reference or self.update.refreshes_reference
        return self.with_reference and needed

    @property
    def stateful(self) -> dict[str, Method]:
        """Methods that remember something, by the name of their memory."""
        methods = {t.memory_name: t.function for t in self.credit if isinstance(t.function, Method)}
        return methods | {t.memory_name: t.coefficient for t in self.losses if isinstance(t.coefficient, Method)}
