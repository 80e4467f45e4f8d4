"""Dual-head knowledge distillation: labels teach one head, a teacher's logits another, and the trunk hears both."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.ranges import Count, Positive, ranged


@ranged
def binary_logit_divergence(
    auxiliary_logits: Float[Array, "... C"], teacher_logits: Float[Array, "... C"], *, temperature: Positive = 2.0
) -> Float[Array, "..."]:
    """How far logits are from a teacher's, each as an even chance of its own.

        T^2 sum_c KL(Bernoulli(1/2) || Bernoulli(sigmoid((z_c - z^teacher_c) / T)))

    It is 0 at equal logits alone, and not where they differ by a constant. For a vocabulary, c goes over the teacher's
    top k and the target.

    Args:
      auxiliary_logits: z, of the auxiliary head, which is dropped at inference.
      teacher_logits: of the teacher, without a gradient.
      temperature: T.

    >>> round(float(binary_logit_divergence(jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0]))), 6)
    0.480458

    Reference: DHKD (2411.08937).
    Certainty: verified
    """
    chex.assert_equal_shape([auxiliary_logits, teacher_logits])
    gap = auxiliary_logits.astype(jnp.float32) - jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    share = jnp.clip(jax.nn.sigmoid(gap / temperature), 1e-8, 1 - 1e-8)
    each = 0.5 * jnp.log(0.5 / share) + 0.5 * jnp.log(0.5 / (1 - share))
    return temperature**2 * each.sum(-1)


@ranged
def dual_head_distillation(
    auxiliary_values: Float[Array, "B T V"],
    top_tokens: Int[Array, "B T K"],
    top_logprobs: Float[Array, "B T K"],
    mask: Float[Array, "B T"],
    *,
    temperature: Positive = 2.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """A second vocabulary head against a teacher's likeliest tokens; labels teach the policy's own head beside it.

    The head is a network named `auxiliary` with one output for each token of the vocabulary and a shared backbone, so
    its loss reaches the trunk and never the policy's own head. Each place sums `binary_logit_divergence` over the
    tokens that a file has stored there; stored log-probabilities stand for logits, which they are up to a constant.

    Args:
      auxiliary_values: logits of the second head.
      top_tokens: likeliest tokens of the teacher in each place; -1 for fewer.
      top_logprobs: their log-probabilities.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      temperature: of both.
      aggregation, max_completion_tokens: how token losses are averaged.

    Returns:
      The loss as a sum and a count.

    Reference: DHKD (2411.08937).
    Certainty: verified
    """
    chex.assert_rank([auxiliary_values, top_tokens, top_logprobs, mask], [3, 3, 3, 2])
    there = top_tokens >= 0
    own = jnp.take_along_axis(auxiliary_values, jnp.maximum(top_tokens, 0), axis=-1)
    # Equal logits add nothing.
    teacher = jnp.where(there, top_logprobs, jax.lax.stop_gradient(own))
    per_token = binary_logit_divergence(own, teacher, temperature=temperature)
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


def aligned_gradients(distillation: PyTree, cross_entropy: PyTree) -> PyTree:
    """The sum of two gradients of shared parameters, the first without what works against the second.

        g_KD <- g_KD - min(0, <g_KD, g_CE>) / |g_CE|^2 g_CE,    g_KD + g_CE

    >>> aligned_gradients(jnp.array([-1.0, 1.0]), jnp.array([1.0, 0.0])).tolist()
    [1.0, 1.0]

    Reference: DHKD (2411.08937).
    Certainty: verified
    """
    product = lambda a, b: sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)))  # noqa: E731
    size = product(cross_entropy, cross_entropy)
    against = jnp.minimum(product(distillation, cross_entropy), 0.0) / jnp.where(size == 0, 1.0, size)
    return jax.tree.map(lambda d, c: d - against * c + c, distillation, cross_entropy)
