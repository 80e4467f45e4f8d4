"""The pytrees of a training step, and the protocols of methods.

Shapes use the same letters in all modules:

    B  sequences (rows)          T  completion positions       P  prompt positions
    K  reward components         A  reference-answer positions V  vocabulary       D  model width

The first axis of every array of `Experience` is rows. The samples of one prompt share a `group` id; arrays are never
reshaped to (prompts, samples), so groups may have different sizes, and a row of weight 0 counts as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree


class KeyUse(IntEnum):
    """First number folded into a run's key, so that different uses of randomness have different keys."""

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


def key_at(key: Array, *where: Int[Array, ""] | int) -> Array:
    """The key with these numbers folded in, in their order."""
    for number in where:
        key = jax.random.fold_in(key, number)
    return key


def without_end(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """Token ids of a completion without its end of sequence, as its text is read.

    >>> without_end([5, 6, 2], eos_ids=(2,)), without_end([5, 6], eos_ids=(2,))
    ([5, 6], [5, 6])
    """
    return [int(id) for id in (ids[:-1] if len(ids) and int(ids[-1]) in eos_ids else ids)]


def uniforms_at(key: Array, *where: Int[Array, "*B"] | int) -> Float[Array, "B"]:
    """A random number in [0, 1) for each of B addresses, such as (step, prompt, sample), in any order of rows.

    Args:
      key: base key.
      where: numbers of the address, each a scalar or one number per row.
    """
    return jax.vmap(lambda *at: jax.random.uniform(key_at(key, *at)))(*jnp.broadcast_arrays(*where))


class Source(IntEnum):
    """Origin of a completion token (`Experience.source`)."""

    PAD = 0  # after the end of the completion
    SAMPLED = 1  # drawn by the policy: trained on by default
    DEMONSTRATION = 2  # not sampled by the policy
    OBSERVATION = 3  # returned by an environment or a tool
    HINT = 4  # a hint at the start of the completion
    REPLAYED = 5  # drawn by the policy of an earlier step


@struct.dataclass
class Prompts:
    """The prompts of a rollout: N rows.

    Attributes:
      tokens: left-padded prompt tokens.
      length: real tokens in each prompt, at least 1 (begin of sequence counts).
      prompt_id: stable id of the prompt in its data set; random keys and per-prompt statistics are derived from it.
      answer_tokens: right-padded reference answer, for in-graph verifiers.
      answer_length: real tokens in each reference answer.
      fields: further columns of the data by name, one entry per prompt; rows of the prompt have fields of the same
          name.
    """

    tokens: Int[Array, "N P"]
    length: Int[Array, "N"]
    prompt_id: Int[Array, "N"]
    answer_tokens: Int[Array, "N A"]
    answer_length: Int[Array, "N"]
    fields: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Experience:
    """B sequences: the arrays of sampling as attributes, all other arrays by name in `fields`.

    `rows[name]` reads either; `rows.filled(name=...)` returns rows with additional arrays. `jaxrl_llm.fields` is the
    table of names with meanings, shapes and providers.

    Attributes:
      prompt_tokens, prompt_length, prompt_id, answer_tokens, answer_length: as in `Prompts`, one row per sample.
      sample: number of the sample within its group.
      group: id of the group (the samples of one prompt); any integers in [0, B).
      weight: weight of the row in losses and statistics; 0 for an absent row.
      tokens: completion tokens, right-padded; the end-of-sequence token is part of the completion.
      length: tokens of each completion, including end of sequence.
      source: a `Source` for each completion token.
      mask: 1 on the tokens that are trained on.
      behaviour_logprobs: log-probability of each token under the distribution that it was sampled from.
      behaviour_entropy: entropy of that distribution in nats.
      truncated: the completion reached its length limit before end of sequence.
      router_choices: experts that processed each token of prompt and completion; None if not recorded.
      support: with truncated sampling, the candidate tokens that each token was sampled from, padded with -1; the
        trainer normalises over them. None for the whole vocabulary.
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
        """All arrays by name, without attributes that are None."""
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
        """The rows with these arrays added or replaced."""
        facts = {name: value for name, value in values.items() if name in FACTS}
        rest = {name: value for name, value in values.items() if name not in FACTS}
        return replace(self, **facts, fields=self.fields | rest)


# Names of the arrays of sampling, in order.
FACTS = tuple(f.name for f in fields(Experience) if f.name != "fields")


@struct.dataclass
class Sequences:
    """The result of a view: sequences to be scored, one per row.

    Attributes:
      prompt_tokens, prompt_length: the context, left-padded.
      tokens, length: the scored tokens, right-padded.
      mask: 1 on scored tokens that count.
    """

    prompt_tokens: Int[Array, "B P"]
    prompt_length: Int[Array, "B"]
    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]
    mask: Float[Array, "B T"]


@struct.dataclass
class Branches:
    """The result of a view with Q sequences per row, which continue the row's own completion from different positions.

    They are scored in one pass over the row, which all of them share, and one pass over the continuations.

    Attributes:
      kept: number of tokens of the completion before each continuation.
      tokens, length: the scored continuations, right-padded.
      mask: 1 on scored tokens that count.
    """

    kept: Int[Array, "B Q"]
    tokens: Int[Array, "B Q A"]
    length: Int[Array, "B Q"]
    mask: Float[Array, "B Q A"]


@struct.dataclass
class NetworkState:
    """Parameters of one network.

    Attributes:
      params: parameters of its model; with a head {"head", and "backbone" unless it shares the policy's}. For a copy of
        a policy with adapters, only the adapters.
      optimizer_state: state of its own optimiser; None for a network that does not learn.
    """

    params: PyTree
    optimizer_state: PyTree = None


@struct.dataclass
class TrainState:
    """Everything that a step changes, and thus the content of a checkpoint (of parameters, only the trained ones).

    Attributes:
      networks: the policy and every other network by name.
      memory: memories of stateful methods, plans and selections, by name (see `Method`).
      key: the run's random key; never split or replaced, only folded with (step, prompt, sample, position).
      step: number of completed steps; also the position in the data.
      store: rows kept between steps: "replay", and "ahead", the batch sampled in advance.
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
      denominator: float32 scalar, 0 if this part of the batch has no counted entries; None for a plain sum (the
        numerator was already divided by a constant, so parts of a batch are added and not divided).
      metrics: named (sum, count) pairs to log, for example the share of clipped tokens.
    """

    numerator: Float[Array, ""]
    denominator: Float[Array, ""] | None
    metrics: dict[str, tuple[Array, Array]] = {}

    @property
    def value(self) -> Float[Array, ""]:
        """numerator / denominator, and 0 for a denominator of 0."""
        if self.denominator is None:
            return self.numerator
        return self.numerator / jnp.where(self.denominator == 0, 1.0, self.denominator)


class Method(NamedTuple):
    """A method with a memory between steps, like an optax transformation.

    Attributes:
      init: () -> memory, a pytree of arrays.
      update: (memory, *data, **hyper-parameters) -> (value, memory). After `memory`, its positional parameters are
        named after fields of `Experience` (or metrics, for a controller), as for a function without memory.
    """

    init: Callable[[], PyTree]
    update: Callable[..., tuple[Any, PyTree]]


class Selection(NamedTuple):
    """Chooses the prompts of each step, with a memory in the state.

    The prompts of a step are chosen by the memory of two steps before, because they are needed while the previous step
    is still running. The two pending choices are in the state, so a resumed run makes the same choices.

    Attributes:
      init: () -> memory, a pytree of arrays.
      choose: (memory, key, count) -> indices of items [count], from 0 in the order of the data. An item may be chosen
        more than once; each time it gets separate samples.
      update: (memory, *data) -> memory. Its data are fields of rows, and `item`, the index of each row's item.
      report: memory -> numbers to log as `selection/<name>`; None: none.
    """

    init: Callable[[], PyTree]
    choose: Callable[[PyTree, Array, int], Int[Array, "N"]]
    update: Callable[..., PyTree]
    report: Callable[[PyTree], dict[str, Array]] | None = None
