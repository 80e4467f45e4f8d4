"""Dual-head knowledge distillation: one head for labels, one for a teacher's logits, with a shared trunk."""

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
    """Distance of logits from a teacher's, as a Bernoulli divergence of each difference from 1/2.

        T^2 sum_c KL(Bernoulli(1/2) || Bernoulli(sigmoid((z_c - z^teacher_c) / T)))

    It is 0 only at equal logits, not where they differ by a constant. For a vocabulary, c runs over the teacher's top k
    tokens and the target.

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
    """Loss of a second vocabulary head on a teacher's most likely tokens; the policy's own head is trained on labels.

    The head is a network named `auxiliary` with one output for each token of the vocabulary and a shared backbone, so
    its gradient reaches the trunk but not the policy's own head. Each position sums `binary_logit_divergence` over the
    tokens stored for it in the data file; stored log-probabilities equal logits up to a constant.

    Args:
      auxiliary_values: logits of the second head.
      top_tokens: most likely tokens of the teacher at each position; -1 pads.
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
    # Padding gets equal logits, which add 0.
    teacher = jnp.where(there, top_logprobs, jax.lax.stop_gradient(own))
    per_token = binary_logit_divergence(own, teacher, temperature=temperature)
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


def aligned_gradients(distillation: PyTree, cross_entropy: PyTree) -> PyTree:
    """The sum of two gradients of shared parameters, the first without its component against the second.

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
