"""Losses on reference answers after sampled thoughts."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate

Likelihood = Literal["probability", "mean_probability", "log_probability", "mean_log_probability"]


def weighted_answer_likelihood(
    answer_logprobs: Float[Array, "B A"],
    answer_mask: Float[Array, "B A"],
    answer_weight: Float[Array, "B"],
    weight: Float[Array, "B"],
    *,
    aggregation: Aggregation = "seq_mean_token_sum",
) -> Loss:
    """Cross-entropy of the reference answer after the sampled thought, each row with a weight of its own.

        x = -answer_weight * log pi

    The expectation over thoughts z of a function f of the answer's probability p has a gradient of two terms: that of a
    policy gradient with the reward f(p), and this one with answer_weight = f'(p) p. For the identity answer_weight is
    the reward itself (`answer_weight: raw_rewards`), for the logarithm 1. The released code also offers `answer_weight:
    leave_one_out`.

    Args:
      answer_logprobs: log-probability of each token of the view `answer` under the current policy.
      answer_mask: 1 on the tokens of the answer.
      answer_weight: a constant factor of each row's loss.
      weight: weight of each row; 0 is absent.
      aggregation: how token losses are averaged; the paper sums over tokens and averages over rows, as does its policy
        gradient.

    Returns:
      The loss as a sum and a count.

    Reference: VeriFree (2505.21493).
    Certainty: verified
    """
    chex.assert_rank([answer_logprobs, answer_mask, answer_weight, weight], [2, 2, 1, 1])
    chex.assert_equal_shape([answer_logprobs, answer_mask])
    chex.assert_equal_shape_prefix([answer_logprobs, answer_weight, weight], 1)
    per_token = -answer_weight.astype(jnp.float32)[:, None] * answer_logprobs.astype(jnp.float32)
    return aggregate(per_token, answer_mask * weight[:, None], aggregation=aggregation)


def answer_likelihood_gradient(
    answer_logprobs: Float[Array, "B A"],
    answer_mask: Float[Array, "B A"],
    weight: Float[Array, "B"],
    *,
    form: Likelihood = "log_probability",
) -> Loss:
    """The second term of the gradient of an expected likelihood: that of the answer's likelihood for given thoughts.

        x = -f(answer)

    with f the `form` of `answer_likelihood` that is the reward of the thoughts. Added to the policy gradient of that
    reward it gives the whole gradient of E_thought[f] for every form; a recipe with the same form in both is unbiased.

    Args:
      answer_logprobs: log-probability of each token of the view `answer` under the current policy.
      answer_mask: 1 on the tokens of the answer; a row without any is left out.
      weight: weight of each row; 0 is absent.
      form: probability, mean_probability, log_probability or mean_log_probability.

    Returns:
      The loss as a sum and a count of rows.

    Raises:
      ValueError: for an unknown form.

    Reference: likelihood-based rewards (2602.03979).
    Certainty: verified
    """
    chex.assert_rank([answer_logprobs, answer_mask, weight], [2, 2, 1])
    chex.assert_equal_shape([answer_logprobs, answer_mask])
    if form not in get_args(Likelihood):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Likelihood))}")
    counted = answer_mask > 0
    logprobs = jnp.where(counted, answer_logprobs.astype(jnp.float32), 0.0)
    each = jnp.where(counted, jnp.exp(logprobs), 0.0) if form == "mean_probability" else logprobs
    value = each.sum(axis=1)
    if form.startswith("mean"):
        value = value / jnp.maximum(counted.sum(axis=1), 1)
    value = jnp.exp(value) if form == "probability" else value
    there = jnp.where(counted.any(axis=1), weight.astype(jnp.float32), 0.0)
    return Loss(-jnp.where(there > 0, there * value, 0.0).sum(), there.sum())
