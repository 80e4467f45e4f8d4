"""Rewards without labels: the policy's confidence in its samples."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import ranged

Reduce = Literal["mean", "sum"]
Likelihood = Literal["mean_log_probability", "log_probability", "probability", "mean_probability"]


def vocabulary_certainty(log_probabilities: Float[Array, "B C V"], tokens: Int[Array, "B C"]) -> Float[Array, "B C"]:
    """Divergence of the next-token distribution at each token from the uniform one.

        c_t = -(1 / V) sum_v log p_t(v) = KL(uniform || p_t) + log V

    Args:
      log_probabilities: of the policy before the update, for one chunk.
      tokens: of the same positions; not used.

    Returns:
      One number per token; its mean is the reward, see `token_mean`.

    Reference: Intuitor, self-certainty (2505.19590).
    Certainty: verified
    """
    chex.assert_rank([log_probabilities, tokens], [3, 2])
    return -log_probabilities.astype(jnp.float32).mean(axis=-1)


def token_mean(token_certainty: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, "B"]:
    """Mean over the tokens that count; 0 in rows without one.

        r = sum_t m_t c_t / max(sum_t m_t, 1)

    Args:
      token_certainty: a number of each token (`vocabulary_certainty`; with `reads`, any other).
      mask: non-zero on tokens that count.

    Returns:
      One reward per row, float32.

    Reference: Intuitor, self-certainty (2505.19590).
    Certainty: verified
    """
    return _over_tokens(token_certainty, mask, "mean")


@ranged
def negative_entropy(
    old_entropy: Float[Array, "B T"], mask: Float[Array, "B T"], *, reduce: Reduce = "mean"
) -> Float[Array, "B"]:
    """The negative mean token entropy of the policy along the completion.

        r = -mean_t H(p_t)      (or the sum)

    It sharpens the policy regardless of correctness, and long training favours repetition.

    Args:
      old_entropy: entropy of the policy at each token, in nats.
      mask: non-zero on tokens that count.
      reduce: "mean" or "sum" over them.

    Returns:
      One reward per row, at most 0; 0 in rows without tokens.

    Raises:
      ValueError: for an unknown reduction.

    Reference: entropy minimisation (2505.15134).
    Certainty: verified
    """
    return -_over_tokens(old_entropy, mask, reduce)


@ranged
def sequence_likelihood(
    old_logprobs: Float[Array, "B T"], mask: Float[Array, "B T"], *, form: Likelihood = "mean_log_probability"
) -> Float[Array, "B"]:
    """Likelihood of the completion under the policy that sampled it.

        mean_log_probability   mean_t log p(y_t)
        log_probability        sum_t log p(y_t)
        probability            exp(sum_t log p(y_t)); long training favours very short completions
        mean_probability       exp(mean_t log p(y_t)), per token

    Args:
      old_logprobs: log-probability of each token under the policy before the update.
      mask: non-zero on tokens that count.
      form: as above.

    Returns:
      One reward per row; 0 in rows without tokens, 1 in the probability forms.

    Raises:
      ValueError: for an unknown form.

    Reference: entropy minimisation (2505.15134); URLVR (2603.08660).
    Certainty: verified
    """
    if form not in get_args(Likelihood):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Likelihood))}")
    value = _over_tokens(old_logprobs, mask, "mean" if form.startswith("mean") else "sum")
    return jnp.exp(value) if form in ("probability", "mean_probability") else value


def _over_tokens(values: Array, mask: Array, reduce: str) -> Array:
    chex.assert_rank([values, mask], 2)
    chex.assert_equal_shape([values, mask])
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce is {reduce!r}; it must be one of {', '.join(get_args(Reduce))}")
    counted = mask > 0
    total = jnp.where(counted, values.astype(jnp.float32), 0.0).sum(axis=1)
    return total / jnp.maximum(counted.sum(axis=1), 1) if reduce == "mean" else total
