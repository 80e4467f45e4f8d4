"""The likelihood of the reference answer as the reward, without a verifier of the sampled answer."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import ranged

LikelihoodForm = Literal["probability", "mean_probability", "log_probability", "mean_log_probability"]


@ranged
def answer_likelihood(
    answer_logprobs: Float[Array, "*B A"],
    answer_mask: Float[Array, "*B A"],
    *,
    form: LikelihoodForm = "probability",
    without_answer: float = 0.0,
) -> Float[Array, "*B"]:
    """Likelihood of the reference answer after the sampled thought.

        probability            r = exp(sum_t l_t)
        mean_probability       r = mean_t exp(l_t)
        log_probability        r = sum_t l_t
        mean_log_probability   r = mean_t l_t

    over the tokens t of the answer, with l_t their log-probabilities. Recipes build the sequence as a view `answer:
    answer_after_thought`. Where right answers are unique, the expected `probability` is the expected 0/1 reward of a
    verifier, with less variance. It vanishes for long answers, where the logarithmic forms still have a signal.

    Args:
      answer_logprobs: log-probability of each token of the reference answer.
      answer_mask: 1 on its tokens; all 0 in rows whose thought was truncated.
      form: one of the four.
      without_answer: reward of truncated rows. In the two logarithmic forms 0 is the highest reward, so give a low one.

    Returns:
      One reward per row, float32; for a view with several sequences per row (`answer_after_turns`), one per sequence.

    Raises:
      ValueError: for an unknown form.

    Reference: VeriFree (2505.21493), likelihood-based rewards (2602.03979).
    Certainty: verified
    """
    chex.assert_rank([answer_logprobs, answer_mask], {2, 3})
    chex.assert_equal_shape([answer_logprobs, answer_mask])
    if form not in get_args(LikelihoodForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(LikelihoodForm))}")
    counted = answer_mask > 0
    logprobs = jnp.where(counted, answer_logprobs.astype(jnp.float32), 0.0)
    tokens = counted.sum(axis=-1)
    most = jnp.maximum(tokens, 1)
    match form:
        case "probability":
            value = jnp.exp(logprobs.sum(axis=-1))
        case "mean_probability":
            value = jnp.where(counted, jnp.exp(logprobs), 0.0).sum(axis=-1) / most
        case "log_probability":
            value = logprobs.sum(axis=-1)
        case "mean_log_probability":
            value = logprobs.sum(axis=-1) / most
    return jnp.where(tokens > 0, value, without_answer)
