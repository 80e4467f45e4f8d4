"""Advantages from a lower bound on the reference answer's log-likelihood over all thoughts of a prompt."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def jensen_bound(
    answer_logprobs: Float[Array, "B A"],
    answer_mask: Float[Array, "B A"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """How much each thought adds to the log of the mean likelihood of its group, and its share of that likelihood.

        A_i = log(mean_j p_j) - log(mean_{j != i} p_j)
        w_i = p_i / sum_j p_j

    with p_i the probability of the reference answer after thought i. The mean is inside the logarithm, so the bound is
    tighter than mean_j log p_j, and the more so the larger the group. `"[advantages, answer_weight]": jensen_bound`
    fills both: A trains the thoughts, `weighted_answer_likelihood` the answers.

    Args:
      answer_logprobs: log-probability of each token of the view `answer`.
      answer_mask: 1 on its tokens; a row without any, whose thought was cut off, has p = 0 and advantage 0.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      (advantages, answer weights), float32. A row whose group has no other answer has advantage 0.

    Reference: JEPO (2503.19618).
    Certainty: verified
    """
    chex.assert_rank([answer_logprobs, answer_mask, group, weight], [2, 2, 1, 1])
    chex.assert_equal_shape([answer_logprobs, answer_mask])
    counted = answer_mask > 0
    known = counted.any(axis=1) & (weight > 0)
    total = jnp.where(counted, answer_logprobs.astype(jnp.float32), 0.0).sum(axis=1)
    together = (group[:, None] == group[None, :]) & known[None, :] & known[:, None]
    others = together & ~jnp.eye(len(group), dtype=bool)
    # Excluded entries get a large negative number: a difference of infinities would be NaN.
    log_sum = lambda pairs: jax.nn.logsumexp(jnp.where(pairs, total[None, :], -1e30), axis=1)  # noqa: E731
    size, rest = together.sum(axis=1), others.sum(axis=1)
    every = log_sum(together)
    bound, without = every - jnp.log(jnp.maximum(size, 1)), log_sum(others) - jnp.log(jnp.maximum(rest, 1))
    return jnp.where(rest > 0, bound - without, 0.0), jnp.where(known, jnp.exp(total - every), 0.0)
