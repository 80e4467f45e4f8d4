"""The pytrees that flow through a training step, and the small protocols that methods speak.

Shapes are written with the same letters everywhere:

    B  sequences (rows)          T  completion positions       P  prompt positions
    K  reward components         A  reference-answer positions V  vocabulary       D  model width

Every array of `Experience` is flat over rows. The samples of one prompt share a `group` id; nothing is ever
reshaped to (prompts, samples), so groups may be ragged and a row of weight 0 is simply absent.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree


class KeyUse(IntEnum):
    """First number folded into a run's key, so that no two uses of randomness share an address."""

    INITIALISE = 0
    MINIBATCHES = 1
    EVALUATE = 2
    ROLLOUT = 3
    REPLAY = 4
    REHEARSAL = 5
    ENVIRONMENT = 6


class Source(IntEnum):
    """Where a completion token came from (`Experience.source`)."""

    PAD = 0  # after the end of the completion
    SAMPLED = 1  # drawn by the policy: trained on by default
    DEMONSTRATION = 2  # written by somebody else
    OBSERVATION = 3  # returned by an environment or a tool
    HINT = 4  # placed in front of the completion to help
    REPLAYED = 5  # drawn by the policy of an earlier step


@struct.dataclass
class Prompts:
    """What a rollout starts from: one row a prompt, N rows.

    Attributes:
      tokens: left-padded prompt tokens.
      length: real tokens in each prompt, at least 1 (begin of sequence counts).
      prompt_id: stable id of the prompt in its data set; addresses the random keys and per-prompt statistics.
      answer_tokens: right-padded reference answer, for in-graph verifiers.
      answer_length: real tokens in each reference answer.
      demonstration_tokens: right-padded reference completion, end of sequence included; None where nothing asks for it.
      demonstration_length: real tokens in each reference completion.
    """

    tokens: Int[Array, "N P"]
    length: Int[Array, "N"]
    prompt_id: Int[Array, "N"]
    answer_tokens: Int[Array, "N A"]
    answer_length: Int[Array, "N"]
    demonstration_tokens: Int[Array, "N T"] | None = None
    demonstration_length: Int[Array, "N"] | None = None


@struct.dataclass
class Experience:
    """Facts about B sampled sequences. Each stage of a step fills in more of them.

    Filled by the rollout (collect):
      prompt_tokens, prompt_length, prompt_id, answer_tokens, answer_length: as in `Prompts`, one row a sample.
      sample: number of the sample within its group.
      group: id of the group (the samples of one prompt); any integers in [0, B).
      weight: 1 for a row that counts, 0 for an absent one, fractions for a row that counts in part.
      tokens: completion tokens, right-padded; the end-of-sequence token is part of the completion.
      length: completion tokens including end of sequence.
      source: a `Source` for each completion token.
      mask: 1 on the tokens that are trained on.
      behaviour_logprobs: log-probability of each token under the distribution that it was drawn from.
      behaviour_entropy: entropy of that distribution in nats.
      truncated: the completion reached its length limit before end of sequence.
      router_choices: experts that served each token of prompt and completion; None where they are not recorded.
      support: tokens that each token was drawn from, -1 for fewer than S, where sampling is truncated: the trainer
        normalises over the same ones. None where it is the whole vocabulary.

    Filled by the rewards (score):
      reward_components: one column a reward function, before weights.
      rewards: the weighted sum that is maximised.
      correct: 1 where the first reward function of the recipe, the verifier, returned at least 1; of a conversation,
        where its environment says that it was solved.

    Filled on demand (credit), None until something asks for them:
      token_rewards (rewards given to single tokens, such as a penalty), advantages, token_weight,
      old_logprobs (the policy that the update starts from), old_entropy,
      reference_logprobs, old_values, returns, turn (index of the turn that a token belongs to),
      demonstration_tokens, demonstration_length (as in `Prompts`).

    extras: what only some methods know of, by name: an array with one entry a row. A credit entry may fill any name.
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
    reward_components: Float[Array, "B K"] | None = None
    rewards: Float[Array, "B"] | None = None
    correct: Float[Array, "B"] | None = None
    token_rewards: Float[Array, "B T"] | None = None
    advantages: Float[Array, "B T"] | None = None
    token_weight: Float[Array, "B T"] | None = None
    old_logprobs: Float[Array, "B T"] | None = None
    old_entropy: Float[Array, "B T"] | None = None
    reference_logprobs: Float[Array, "B T"] | None = None
    old_values: Float[Array, "B T"] | None = None
    returns: Float[Array, "B T"] | None = None
    turn: Int[Array, "B T"] | None = None
    demonstration_tokens: Int[Array, "B T"] | None = None
    demonstration_length: Int[Array, "B"] | None = None
    router_choices: Int[Array, "B P+T L k"] | None = None
    support: Int[Array, "B T S"] | None = None
    extras: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class CriticState:
    """A network with scalar outputs that is trained beside the policy.

    Attributes:
      params: "head", and "backbone" where it does not share the policy's.
      optimizer_state: state of its own optimiser.
      target_params: slowly moving copy; None where nothing asks for one.
    """

    params: PyTree
    optimizer_state: PyTree
    target_params: PyTree | None = None


@struct.dataclass
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint holds (of params what learns).

    Attributes:
      params: the policy.
      optimizer_state: state of the policy's optimiser, for the part of params that learns.
      reference_params: frozen snapshot of that part, for divergences; None when no method asks for one, or where the
        reference is the policy without its adapters.
      memory: what stateful methods remember, by method name (see `Method`).
      key: the run's random key; never split or replaced, only folded with (step, prompt, sample, position).
      step: updates of the batch made so far; also the position in the data.
      critics: value models and their like, by name.
      replay: rows of earlier batches that may be learned from again; None without replay.
      ahead: the next batch, where it is sampled beside the update before it; None elsewhere.
    """

    params: PyTree
    optimizer_state: PyTree
    reference_params: PyTree | None
    memory: dict[str, PyTree]
    key: Array
    step: Int[Array, ""]
    critics: dict[str, CriticState] = struct.field(default_factory=dict)
    replay: Experience | None = None
    ahead: Experience | None = None


class Loss(NamedTuple):
    """A scalar objective as a sum and a count, so that any split of a batch gives the same gradient.

    The value is numerator / denominator; the division happens once, after microbatches and devices are summed.
    The denominator must not depend on the current policy.

    Attributes:
      numerator: float32 scalar, differentiable.
      denominator: float32 scalar, 0 where nothing in this part of the batch counts; None for a plain sum (the numerator
        was divided by a constant already, so parts of a batch are added and never divided).
      metrics: named (sum, count) pairs to log, for example the share of clipped tokens.
    """

    numerator: Float[Array, ""]
    denominator: Float[Array, ""] | None
    metrics: dict[str, tuple[Array, Array]] = {}

    @property
    def value(self) -> Float[Array, ""]:
        """numerator / denominator, and 0 where nothing counts."""
        if self.denominator is None:
            return self.numerator
        return self.numerator / jnp.where(self.denominator == 0, 1.0, self.denominator)


class Method(NamedTuple):
    """A method that remembers something between steps, in the manner of an optax transformation.

    Attributes:
      init: () -> memory, a pytree of arrays.
      update: (memory, *data, **hyper-parameters) -> (value, memory). After `memory`, its positional parameters are
        named after fields of `Experience` (or metrics, for a controller), as for a function without memory.
    """

    init: Callable[[], PyTree]
    update: Callable[..., tuple[Any, PyTree]]
