"""A loss on reference answers behind sampled thoughts."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate


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

    The expectation over thoughts z of a function f of the answer's probability p has a gradient of two terms: that of
    a policy gradient with the reward f(p), and this one with answer_weight = f'(p) p. For f the identity that is the
    reward itself (`answer_weight: raw_rewards`), for the logarithm 1. The released code also offers `answer_weight:
    leave_one_out`.

    Args:
      answer_logprobs: log-probability of each token of the view `answer` under the current policy.
      answer_mask: 1 on the tokens of the answer.
      answer_weight: a constant factor of each row's loss.
      weight: weight of each row; 0 is absent.
      aggregation: how token losses are averaged; a sum over tokens and a mean over rows is the paper's, which goes with
        a policy gradient of the same mode.

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
