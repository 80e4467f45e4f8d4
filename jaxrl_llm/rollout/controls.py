"""Controls of sampling: truncation, penalties, biases, allowed tokens, minimum length and stop texts.

Controls shape generation for evaluation and inspection. A training rollout samples from the policy's own distribution
(see `generate`), because the trainer scores with that distribution.
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
    """Changes of the distribution of the next token before it is sampled.

    They apply in this order: repetition penalty, bias, allowed tokens, minimum length; then the temperature; then
    top-k, top-p and min-p, each on the tokens kept by the one before; then renormalisation.

    Attributes:
      top_k: only the k most probable tokens; None keeps all.
      top_p: the fewest most probable tokens whose probabilities sum to at least this; 1 keeps all.
      min_p: only tokens at least this share as probable as the most probable one; 0 keeps all.
      repetition_penalty: scores of tokens that occur in the prompt or the completion are divided by it if positive and
        multiplied if negative; 1 has no effect.
      logit_bias: added to the scores of token ids.
      allowed_ids: the only token ids that may be sampled, in addition to ends of sequence; None allows all.
      min_completion_tokens: no end of sequence and no stop text before this number of tokens.
      stop: automaton of the texts after which a completion ends; see `stop_automaton`.

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
        """Whether top-k, top-p or min-p removes tokens."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0

    def check(self, vocabulary_size: int, max_completion_tokens: int) -> None:
        """Check for ids outside of the vocabulary, and a minimum length above the maximum.

        Raises:
          ValueError: naming the wrong field.
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
      scores: logits of the next token.
      controls: the changes.
      seen: tokens of prompt and completion so far; needed for a repetition penalty.
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
    """Renormalised log-probabilities of the tokens kept by top-k, top-p and min-p; -inf elsewhere.

    Ties at the threshold are kept, so that the result does not depend on the order of the vocabulary.
    """
    if not controls.truncates:
        return log_p
    if controls.top_k is not None and controls.top_k < log_p.shape[-1]:
        least = jax.lax.top_k(log_p, controls.top_k)[0][:, -1:]
        log_p = _renormalised(log_p, log_p >= least)
    if controls.top_p < 1:
        descending = -jnp.sort(-log_p, axis=-1)
        before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
        # A token is kept while the sum of the tokens before it is below the share; the first is always kept.
        kept = before < controls.top_p
        least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        log_p = _renormalised(log_p, log_p >= least)
    if controls.min_p > 0:
        least = jnp.max(log_p, axis=-1, keepdims=True) + np.log(controls.min_p)
        log_p = _renormalised(log_p, log_p >= least)
    return log_p


def kept_tokens(log_p: Float[Array, "B V"], count: int) -> Int[Array, "B S"]:
    """The kept tokens of a truncated distribution, the most probable first, padded with -1."""
    values, ids = jax.lax.top_k(log_p, count)
    return jnp.where(values > -jnp.inf, ids, -1).astype(jnp.int32)


def _renormalised(log_p: Float[Array, "B V"], kept: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    return jax.nn.log_softmax(jnp.where(kept, log_p, -jnp.inf), axis=-1)


@struct.dataclass
class Watch:
    """State of the controls for each row; None for parts that are not needed.

    Attributes:
      seen: tokens of prompt and completion.
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
        """(state after one more token, rows in which this token completes a stop text)."""
        seen, stop, stopped = self.seen, self.stop, jnp.zeros(token.shape, bool)
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
        if stop is not None and controls.stop is not None:
            stop = controls.stop.following[stop, token]
            # A stop text that was completed before the minimum length is ignored; a later one may follow.
            stopped = (stop == controls.stop.stopped) & (position + 1 >= controls.min_completion_tokens)
            stop = jnp.where((stop == controls.stop.stopped) & ~stopped, 0, stop)
        return Watch(seen, stop), stopped
