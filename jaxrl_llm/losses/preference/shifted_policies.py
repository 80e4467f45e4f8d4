"""Reward models under distribution shift of the policy: contrastive states, MetaRM's spread of scores."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.siblings import compact_ids, sibling_sum
from jaxrl_llm.ranges import Positive, ranged
from jaxrl_llm.statistics import by_row


def embeddings_of_all(
    contrast_scores: Float[Array, "B N"], weight: Float[Array, "B"]
) -> tuple[Float[Array, "B N"], Int[Array, "B"]]:
    """The embeddings of all rows of the batch, and the place of each row among them, inputs of `sentence_contrast`.

    The field `candidates` belongs to the whole batch: every part of a batch that is split sees all of it.

    Args:
      contrast_scores: an embedding of each row after its last token, of a network `contrast` with a head of N outputs.
      weight: of each row; the embedding of an absent row is 0, which marks no candidate.

    Returns:
      (candidates [B, N], own index [B]).
    """
    chex.assert_rank([contrast_scores, weight], [2, 1])
    there = jnp.where((weight > 0)[:, None], contrast_scores.astype(jnp.float32), 0.0)
    return there, jnp.arange(len(there), dtype=jnp.int32)


@ranged
def sentence_contrast(
    contrast_scores: Float[Array, "B N"],
    candidates: Float[Array, "M N"],
    own_place: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    temperature: Positive = 0.05,
) -> Loss:
    """MOSS: InfoNCE between the final state of an answer and those of all others of the batch.

        x_i = -log( exp(cos(h_i, k_i) / t) / sum_j exp(cos(h_i, k_j) / t) )

    averaged over answers, better and worse ones, beside Bradley-Terry: separated states improve generalisation to new
    answers. With `backbone: shared` of this head and the reward's both terms train the same states.

    Args:
      contrast_scores: h, of the network `contrast` that is trained.
      candidates: k, of every row of the batch before the update (`embeddings_of_all`), in place of a second pass with
        other dropout; 0 is no candidate. No gradient.
      own_place: index of the row's own candidate.
      weight: of each row.
      temperature: t.

    Returns:
      The loss; its count is the (weighted) number of answers. Metric: `told_apart` (answers nearest to their own).

    Raises:
      ValueError: for a temperature that is not positive.

    Reference: Secrets of RLHF II, MOSS-RLHF (2401.06080).
    Certainty: recalled
    """
    chex.assert_rank([contrast_scores, candidates, own_place, weight], [2, 2, 1, 1])
    weights = jnp.where(weight > 0, weight.astype(jnp.float32), 0.0)
    own = jnp.where((weights > 0)[:, None], contrast_scores.astype(jnp.float32), 1.0)
    fixed = jax.lax.stop_gradient(candidates.astype(jnp.float32))
    there = jnp.square(fixed).sum(-1) > 0
    norms = jnp.sqrt(jnp.maximum(jnp.square(fixed).sum(-1), 1e-12))
    h = own / jnp.sqrt(jnp.maximum(jnp.square(own).sum(-1, keepdims=True), 1e-12))
    scores = jnp.where(there, jnp.einsum("bn,mn->bm", h, fixed) / norms / temperature, -jnp.inf)
    scores = jnp.where((weights > 0)[:, None], scores, 0.0)
    said = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), own_place[:, None], axis=1)[:, 0]
    told = (scores.argmax(-1) == own_place).astype(jnp.float32)
    count = weights.sum()
    return Loss(-(weights * said).sum(), count, {"told_apart": ((weights * told).sum(), count)})


def score_spread(reward_scores: Float[Array, "B"], mask: Float[Array, "B T"], group: Int[Array, "B"]) -> Loss:
    """MetaRM: spread of the rewards of a prompt's samples, maximised before a step on pairs.

        J = 2 / K^2 * sum_{i<j} sigmoid(|r_i - r_j|)

    averaged over prompts with K samples. The optimiser `climb_then_descend` ascends J, then takes the gradient of the
    pair loss at that point.

    Args:
      reward_scores: r, of the network `reward` that is trained.
      mask: non-zero on sampled tokens; demonstrations have mask 0 and are left out.
      group: id of the group each row belongs to.

    Returns:
      J; its count is the number of prompts with samples.

    Reference: Secrets of RLHF II, MOSS-RLHF (2401.06080).
    Certainty: recalled
    """
    chex.assert_equal_shape([reward_scores, group])
    there = row_weight(mask.astype(jnp.float32)) > 0
    r = jnp.where(there, reward_scores.astype(jnp.float32), 0.0)
    place, samples = jnp.arange(len(r)), sibling_sum(there.astype(jnp.float32), compact_ids(group))

    def apart(own: Array, i: Array, id: Array) -> Array:
        others = there & there[i] & (group == id) & (place != i)
        return jnp.where(others, jax.nn.sigmoid(jnp.abs(own - r)), 0.0).sum()

    # Both orders of a pair are included, which is 2 times the sum over i < j.
    each = by_row(apart, r, place, group) / jnp.maximum(samples, 1) ** 2
    return Loss(each.sum(), jnp.where(there, 1.0 / jnp.maximum(samples, 1), 0.0).sum())
