"""The pytrees of a training step, and the interfaces of losses, methods and selections.

Shapes use the same letters in all modules:

    B  sequences (rows)          T  completion positions       P  prompt positions
    K  reward components         A  reference-answer positions V  vocabulary       D  model width

The first axis of every array of `Experience` is the row. The samples of one prompt share a `group` id; arrays are never
reshaped to (prompts, samples), so groups may have different sizes. A row of weight 0 is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from enum import IntEnum
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree


class KeyUse(IntEnum):
    """First number folded into the key of a run, so that different uses of randomness get different keys."""

    INITIALISE = 0
    MINIBATCHES = 1
    EVALUATE = 2
    ROLLOUT = 3
    REPLAY = 4
    STORED = 5
    ENVIRONMENT = 6
    PLAN = 7
    SELECTION = 8
    VIEW = 9


class Source(IntEnum):
    """Origin of a completion token (`Experience.source`)."""

    PAD = 0  # after the end of the completion
    SAMPLED = 1  # sampled by the policy: trained on by default
    DEMONSTRATION = 2  # from the data: a demonstration or a stored answer
    OBSERVATION = 3  # output of an environment or a tool
    HINT = 4  # a hint in front of the completion
    REPLAYED = 5  # sampled by the policy of an earlier step


@struct.dataclass
class Prompts:
    """Input of a rollout: one row per prompt, N rows.

    Attributes:
      tokens: left-padded prompt tokens.
      length: tokens of each prompt without padding, at least 1 (begin of sequence counts).
      prompt_id: stable id of the prompt in its data set; index of its random keys and statistics.
      answer_tokens: right-padded reference answer, for in-graph verifiers.
      answer_length: tokens of each reference answer without padding.
      fields: further columns of the data by name, one entry per prompt; its samples get them under the same name.
    """

    tokens: Int[Array, "N P"]
    length: Int[Array, "N"]
    prompt_id: Int[Array, "N"]
    answer_tokens: Int[Array, "N A"]
    answer_length: Int[Array, "N"]
    fields: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Experience:
    """B sampled or written sequences: the data of sampling as attributes, all other arrays by name in `fields`.

    `rows[name]` reads both; `rows.filled(name=...)` returns rows with further or replaced arrays. The table of names in
    `jaxrl_llm.fields` states the meaning, shape and provider of each.

    Attributes:
      prompt_tokens, prompt_length, prompt_id, answer_tokens, answer_length: as in `Prompts`, one row per sample.
      sample: number of the sample within its group.
      group: id of the group (the samples of one prompt), an integer in [0, B).
      weight: weight of each row in sums over rows: usually 1, and 0 for an absent row.
      tokens: completion tokens, right-padded; the end-of-sequence token is part of the completion.
      length: tokens of each completion, including end of sequence.
      source: a `Source` for each completion token.
      mask: 1 on tokens to train on.
      behaviour_logprobs: log-probability of each token under the distribution that it was sampled from.
      behaviour_entropy: entropy of that distribution in nats.
      truncated: whether the completion reached its length limit before end of sequence.
      router_choices: experts chosen for each token of prompt and completion, per layer; None if not recorded.
      support: with truncated sampling, the candidate tokens of each position, padded with -1; the trainer normalises
        over the same tokens. None for the whole vocabulary.
      fields: named arrays, one entry per row.
    """

    prompt_tokens: Int[Array, "B P"]
    prompt_length: Int[Array, "B"]
    prompt_id: Int[Array, "B"]
    answer_tokens: Int[Array, "B A"]
    answer_length: Int[Array, "B"]
    sample: Int[Array, "B"]
    group: Int[Array, "B"]
    weight: Float[Array, "B"]
    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]
    source: Int[Array, "B T"]
    mask: Float[Array, "B T"]
    behaviour_logprobs: Float[Array, "B T"]
    behaviour_entropy: Float[Array, "B T"]
    truncated: Bool[Array, "B"]
    router_choices: Int[Array, "B P+T L k"] | None = None
    support: Int[Array, "B T S"] | None = None
    fields: dict[str, Array] = struct.field(default_factory=dict)

    def known(self) -> dict[str, Array]:
        """All arrays by name; attributes that are None are left out."""
        facts = {name: getattr(self, name) for name in FACTS}
        return {name: value for name, value in facts.items() if value is not None} | self.fields

    def __contains__(self, name: object) -> bool:
        return name in self.fields or (name in FACTS and getattr(self, str(name)) is not None)

    def __getitem__(self, name: str) -> Array:
        if name in self.fields:
            return self.fields[name]
        value = getattr(self, name) if name in FACTS else None
        if value is None:
            raise KeyError(f"these rows have no {name!r}; they have {', '.join(sorted(self.known()))}")
        return value

    def get(self, name: str) -> Array | None:
        """The array of this name; None if the rows do not have it."""
        return self.known().get(name)

    def filled(self, **values: Array) -> Experience:
        """The rows with the given arrays added or replaced."""
        facts = {name: value for name, value in values.items() if name in FACTS}
        rest = {name: value for name, value in values.items() if name not in FACTS}
        return replace(self, **facts, fields=self.fields | rest)


# Names of the attributes other than `fields`, in order.
FACTS = tuple(f.name for f in fields(Experience) if f.name != "fields")


@struct.dataclass
class Sequences:
    """Result of a view: sequences to score, one per row.

    Attributes:
      prompt_tokens, prompt_length: context of each sequence, left-padded.
      tokens, length: tokens to score, right-padded.
      mask: 1 on tokens whose scores count.
    """

    prompt_tokens: Int[Array, "B P"]
    prompt_length: Int[Array, "B"]
    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]
    mask: Float[Array, "B T"]


@struct.dataclass
class Branches:
    """Result of a view with Q sequences per row that branch off at different positions of the row's completion.

    They are scored in one pass over the row, which all branches share, and one pass over the branches.

    Attributes:
      kept: number of completion tokens in front of each branch.
      tokens, length: tokens of each branch to score, right-padded.
      mask: 1 on tokens whose scores count.
    """

    kept: Int[Array, "B Q"]
    tokens: Int[Array, "B Q A"]
    length: Int[Array, "B Q"]
    mask: Float[Array, "B Q A"]


@struct.dataclass
class NetworkState:
    """Parameters of one network.

    Attributes:
      params: parameters in the format of the model. A network with a head has {"head"}, and "backbone" unless it shares
        that of the policy. The copy of a policy with adapters has the adapters only.
      optimizer_state: state of its optimiser; None for a frozen network.
    """

    params: PyTree
    optimizer_state: PyTree = None


@struct.dataclass
class TrainState:
    """The state that a step changes and a checkpoint stores (of the parameters only the trained ones).

    Attributes:
      networks: the policy and all other networks by name.
      memory: states of methods, plans and selections, by their name (see `Method`).
      key: random key of the run; it is constant, and folded with (step, prompt, sample, position) at each use.
      step: batches trained on so far; also the position in the data.
      store: rows kept between steps: "replay", and "ahead", a batch that is sampled but not yet trained on.
    """

    networks: dict[str, NetworkState]
    memory: dict[str, PyTree]
    key: Array
    step: Int[Array, ""]
    store: dict[str, Experience] = struct.field(default_factory=dict)

    @property
    def params(self) -> PyTree:
        """Parameters of the policy."""
        return self.networks["policy"].params


class Loss(NamedTuple):
    """A scalar objective as a numerator and a denominator, so that any split of a batch gives the same gradient.

    The value is numerator / denominator; the division follows the sum over microbatches and devices. The denominator
    must not depend on the parameters.

    Attributes:
      numerator: float32 scalar, differentiable.
      denominator: float32 scalar, 0 if no token or row of this part of the batch counts; None for a plain sum, whose
        numerator is already divided by a constant.
      metrics: named (sum, count) pairs to log, such as the share of clipped tokens.
    """

    numerator: Float[Array, ""]
    denominator: Float[Array, ""] | None
    metrics: dict[str, tuple[Array, Array]] = {}

    @property
    def value(self) -> Float[Array, ""]:
        """numerator / denominator, and 0 if the denominator is 0."""
        if self.denominator is None:
            return self.numerator
        return self.numerator / jnp.where(self.denominator == 0, 1.0, self.denominator)


class Method(NamedTuple):
    """A method with state between steps, like an optax transformation.

    Attributes:
      init: () -> memory, a pytree of arrays.
      update: (memory, *data, **hyper-parameters) -> (value, memory). After `memory`, its positional parameters are
        named after fields of `Experience` (or metrics, for a controller), as for a function without memory.
    """

    init: Callable[[], PyTree]
    update: Callable[..., tuple[Any, PyTree]]


class Selection(NamedTuple):
    """A stateful choice of the prompts of each step.

    The prompts of a step are chosen with the memory of two steps before, because they are needed while the previous
    step is still running. The state holds both pending choices, so a resumed run continues with the same prompts.

    Attributes:
      init: () -> memory, a pytree of arrays.
      choose: (memory, key, count) -> item numbers [count], from 0 in the order of the data. An item may be chosen more
        than once; each choice gets separate samples.
      update: (memory, *data) -> memory. Its parameters are named after fields of rows, or `item`, the item number of
        each row.
      report: memory -> numbers to log as `selection/<name>`; None for none.
    """

    init: Callable[[], PyTree]
    choose: Callable[[PyTree, Array, int], Int[Array, "N"]]
    update: Callable[..., PyTree]
    report: Callable[[PyTree], dict[str, Array]] | None = None
