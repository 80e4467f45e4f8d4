"""Gain in the likelihood of the following text from a sampled thought."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import ranged
from jaxrl_llm.rewards.intrinsic.answer_likelihood import LikelihoodForm, answer_likelihood


@ranged
def likelihood_gain(
    answer_logprobs: Float[Array, "B A"],
    answer_mask: Float[Array, "B A"],
    plain_logprobs: Float[Array, "B A"],
    plain_mask: Float[Array, "B A"],
    *,
    form: LikelihoodForm = "mean_probability",
    low: float | None = 0.0,
    high: float | None = 1.0,
    without_answer: float = 0.0,
) -> Float[Array, "B"]:
    """Gain in the likelihood of the reference answer from the sampled thought.

        r = clip(f(answer) - f(plain), low, high)

    with f a form of `answer_likelihood`. RLPR is the mean probability, clipped to [0, 1], of one policy. RLP is the
    unclipped log-probability of the following text, with the baseline from a slowly updated copy of the policy: `reads:
    {plain_logprobs: proxy_plain_logprobs}` with a network `proxy` that has a `decay`. Its mean over thoughts is the
    reduction of the cross-entropy by thinking.

    Args:
      answer_logprobs: log-probability of each token of the view `answer_after_thought`.
      answer_mask: 1 on its tokens; all 0 in rows whose thought was truncated.
      plain_logprobs: of the view `answer_without_thought`.
      plain_mask: 1 on its tokens.
      form: of the likelihood.
      low, high: bounds; None is no bound.
      without_answer: reward of rows whose thought was truncated.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for an unknown form.

    Reference: RLPR (2506.18254), RLP (2510.01265).
    Certainty: verified
    """
    chex.assert_rank([answer_logprobs, answer_mask, plain_logprobs, plain_mask], 2)
    base = answer_likelihood(plain_logprobs, plain_mask, form=form)
    gain = answer_likelihood(answer_logprobs, answer_mask, form=form) - base
    gain = jnp.clip(gain, low, high) if low is not None or high is not None else gain
    return jnp.where((answer_mask > 0).any(axis=1), gain, without_answer)
