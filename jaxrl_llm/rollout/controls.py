"""What may be sampled: truncation, penalties, biases, allowed tokens, minimum length and stop texts.

Controls shape generation for evaluation and inspection. A training rollout samples from the policy's own distribution
(see `generate`), because the trainer scores with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Count, Natural, Positive, PositiveShare, Share, require_ranges
from jaxrl_llm.rollout.stop import StopAutomaton


@dataclass(frozen=True, eq=False)
class Controls:
    """How the distribution of the next token is changed before one is drawn.

    They apply in this order: repetition penalty, bias, allowed tokens, minimum length; then the temperature; then
    top-k, top-p and min-p, each on what the one before left, and the rest is renormalised.

    Attributes:
      top_k: only the k most probable tokens; None keeps all.
      top_p: the fewest most probable tokens whose probabilities sum to at least this; 1 keeps all.
      min_p: only tokens at least this share as probable as the most probable one; 0 keeps all.
      repetition_penalty: scores of tokens that the prompt or the completion holds are divided by it where they are
        positive and multiplied where negative; 1 changes nothing.
      logit_bias: added to the scores of token ids.
      allowed_ids: the only token ids that may be sampled, beside those that end a sequence; None allows all.
      min_completion_tokens: no end of sequence, and no stop text, before so many tokens.
      stop: texts after which a completion ends; see `stop_automaton`.

    References: nucleus sampling (1904.09751), min-p (2407.01082), repetition penalty of CTRL (1909.05858).
    """

    top_k: Count | None = None
    top_p: PositiveShare = 1.0
    min_p: Share = 0.0
    repetition_penalty: Positive = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_ids: tuple[int, ...] | None = None
    min_completion_tokens: Natural = 0
    stop: StopAutomaton | None = None

    def __post_init__(self):
        require_ranges(self, "")
        if self.allowed_ids is not None and not self.allowed_ids:
            raise ValueError("allowed_ids is empty, so nothing could be sampled; give ids, or None to allow all")

    @property
    def truncates(self) -> bool:
        """Whether something takes tokens out by their probability."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0

    def check(self, vocabulary_size: int, max_completion_tokens: int) -> None:
        """Refuse ids outside of the vocabulary, and a minimum beyond the maximum.

        Raises:
          ValueError: naming what is wrong.
        """
        for name, ids in (("logit_bias", tuple(self.logit_bias)), ("allowed_ids", self.allowed_ids or ())):
            if outside := [number for number in ids if not 0 <= number < vocabulary_size]:
                raise ValueError(f"{name} names the token id {outside[0]}, but the ids are 0 to {vocabulary_size - 1}")
        if self.min_completion_tokens > max_completion_tokens:
            raise ValueError(
                f"min_completion_tokens is {self.min_completion_tokens}, more than max_completion_tokens "
                f"{max_completion_tokens}; lower it"
            )


def adjusted_scores(
    scores: Float[Array, "B V"],
    controls: Controls,
    seen: Bool[Array, "B V"] | None,
    position: Array | int,
    eos_ids: tuple[int, ...],
) -> Float[Array, "B V"]:
    """Scores before temperature: penalty, bias, allowed tokens, minimum length.

    Args:
      scores: of the next token.
      controls: what to change.
      seen: tokens that prompt and completion hold so far; needed where there is a repetition penalty.
      position: index of the token in its completion, one number or [B, 1].
      eos_ids: tokens that end a completion.
    """
    scores = scores.astype(jnp.float32)
    size = scores.shape[-1]
    if controls.repetition_penalty != 1 and seen is not None:
        penalised = jnp.where(scores > 0, scores / controls.repetition_penalty, scores * controls.repetition_penalty)
        scores = jnp.where(seen, penalised, scores)
    if controls.logit_bias:
        bias = np.zeros(size, np.float32)
        for number, value in controls.logit_bias.items():
            bias[number] = value
        scores = scores + bias
    ends = np.isin(np.arange(size), eos_ids)
    if controls.allowed_ids is not None:
        allowed = np.isin(np.arange(size), controls.allowed_ids) | ends
        scores = jnp.where(allowed, scores, -jnp.inf)
    if controls.min_completion_tokens:
        too_early = position + 1 < controls.min_completion_tokens
        scores = jnp.where(ends & too_early, -jnp.inf, scores)
    return scores


def truncated(log_p: Float[Array, "B V"], controls: Controls) -> Float[Array, "B V"]:
    """Log-probabilities of what top-k, top-p and min-p leave, renormalised; -inf elsewhere.

    Ties at a border are kept, so that the result does not depend on the order of the vocabulary.
    """
    if not controls.truncates:
        return log_p
    if controls.top_k is not None and controls.top_k < log_p.shape[-1]:
        least = jax.lax.top_k(log_p, controls.top_k)[0][:, -1:]
        log_p = _renormalised(log_p, log_p >= least)
    if controls.top_p < 1:
        descending = -jnp.sort(-log_p, axis=-1)
        before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
        # A token is kept while those before it do not reach the share; the first always is.
        kept = before < controls.top_p
        least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        log_p = _renormalised(log_p, log_p >= least)
    if controls.min_p > 0:
        least = jnp.max(log_p, axis=-1, keepdims=True) + np.log(controls.min_p)
        log_p = _renormalised(log_p, log_p >= least)
    return log_p


def kept_tokens(log_p: Float[Array, "B V"], count: int) -> Int[Array, "B S"]:
    """The tokens of a truncated distribution, the most probable first; -1 in the places of those that there are not."""
    values, ids = jax.lax.top_k(log_p, count)
    return jnp.where(values > -jnp.inf, ids, -1).astype(jnp.int32)


def _renormalised(log_p: Float[Array, "B V"], kept: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    return jax.nn.log_softmax(jnp.where(kept, log_p, -jnp.inf), axis=-1)


@struct.dataclass
class Watch:
    """What controls must know of each row so far; None for what they do not ask for.

    Attributes:
      seen: tokens that prompt and completion hold.
      stop: state of the stop automaton.
    """

    seen: Bool[Array, "B V"] | None = None
    stop: Int[Array, "B"] | None = None

    @classmethod
    def start(
        cls, controls: Controls | None, prompts: Int[Array, "B P"], length: Int[Array, "B"], vocabulary_size: int
    ) -> Watch:
        """Before the first token: left-padded prompts."""
        if controls is None:
            return cls()
        rows, seen = prompts.shape[0], None
        if controls.repetition_penalty != 1:
            real = jnp.arange(prompts.shape[1]) >= prompts.shape[1] - length[:, None]
            seen = jnp.zeros((rows, vocabulary_size), bool).at[jnp.arange(rows)[:, None], prompts].max(real)
        return cls(seen, None if controls.stop is None else jnp.zeros(rows, jnp.int32))

    def after(
        self, token: Int[Array, "B"], position: Int[Array, "B"], controls: Controls
    ) -> tuple[Watch, Bool[Array, "B"]]:
        """(after one more token, which rows it completes a stop text in)."""
        seen, stop, stopped = self.seen, self.stop, jnp.zeros(token.shape, bool)
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
        if stop is not None and controls.stop is not None:
            stop = controls.stop.following[stop, token]
            # A text that was complete too early counts for nothing, and another may follow.
            stopped = (stop == controls.stop.stopped) & (position + 1 >= controls.min_completion_tokens)
            stop = jnp.where((stop == controls.stop.stopped) & ~stopped, 0, stop)
        return Watch(seen, stop), stopped
