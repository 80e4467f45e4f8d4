"""Rewards from embeddings of the samples of a prompt: novelty, leverage, nearness to successes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Count, NonNegative, Positive, Share, ranged
from jaxrl_llm.rewards.verifiers.text_similarity import Tags, said
from jaxrl_llm.statistics import group_max, group_min, group_size, group_sum


@ranged
def ngram_counts(
    completions: Sequence[str], *, letters: Count = 3, buckets: Count = 256, tags: Tags = None
) -> Float[np.ndarray, "B buckets"]:
    """Hashed counts of the character n-grams of each text: an embedding without a model.

    Args:
      completions: texts.
      letters: characters per n-gram.
      buckets: length of the vector.
      tags: tags around the part that is counted, such as those of the answer; "marked" takes the text after `####` or
        in a box; None counts all of it.

    Returns:
      One vector [buckets] per text; zeros for texts without that part, or shorter than `letters`.

    Reference: EVOL-RL (2509.15194).
    Certainty: verified
    """
    made = np.zeros((len(completions), buckets), np.float32)
    for counts, whole in zip(made, completions, strict=True):
        text = said(whole, tags) or ""
        for start in range(len(text) - letters + 1):
            counts[zlib.crc32(text[start : start + letters].encode("utf-8", "replace")) % buckets] += 1
    return made


def mean_hidden(hidden: Float[Array, "B T D"], mask: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean hidden state of the tokens that count: an embedding of the completion; 0 without tokens.

    Args:
      hidden: hidden state at each token.
      mask: non-zero on tokens that count.

    Reference: representation-based exploration (2510.11686).
    Certainty: verified
    """
    chex.assert_rank([hidden, mask], [3, 2])
    counted = (mask > 0)[..., None]
    return jnp.where(counted, hidden.astype(jnp.float32), 0.0).sum(1) / jnp.maximum(counted.sum(1), 1)


def cosine_similarity(embedding: Float[Array, "B D"]) -> Float[Array, "B B"]:
    """Cosine of each pair of rows; 0 with a row of zeros."""
    norm = jnp.linalg.norm(embedding, axis=1, keepdims=True)
    unit = embedding / jnp.where(norm > 0, norm, 1.0)
    return unit @ unit.T


def majority_novelty(
    embedding: Float[Array, "B D"],
    agrees: Float[Array, "B"],
    answer_id: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
) -> Float[Array, "B"]:
    """Rewards in a band set by agreement with the majority, placed within the band by the novelty of the reasoning.

        u_i = 1 - (mean_i + max_i) / 2

    with mean_i the mean similarity to other answered samples of the same outcome (to all others if there is none) and
    max_i the largest similarity to any other answered sample. u is scaled to [0, 1] within each outcome:

        majority   0.5 + 0.5 u       0.75 where all u are equal, 1 for a majority of one
        minority   -1 + 0.5 u        -0.75 where all u are equal, -0.5 for a minority of one
        no answer  -1, as for all rows of a group with at most one answer

    Args:
      embedding: of the reasoning (`ngram_counts`, `mean_hidden`); similarities are cosines, cut to [0, 1].
      agrees: 1 where the row has the answer of the majority (`majority_match`).
      answer_id: negative for none.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One reward per row in [-1, 1]; 0 in absent rows.

    Reference: EVOL-RL (2509.15194).
    Certainty: verified
    """
    chex.assert_rank([embedding, agrees, answer_id, group, weight], [2, 1, 1, 1, 1])
    return banded_novelty(jnp.clip(cosine_similarity(embedding), 0.0, 1.0), agrees, answer_id, group, weight)


def banded_novelty(
    similarity: Float[Array, "B B"],
    agrees: Float[Array, "B"],
    answer_id: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
) -> Float[Array, "B"]:
    """`majority_novelty` from given similarities of all pairs of rows.

    Args:
      similarity: in [0, 1].
      agrees, answer_id, group, weight: as in `majority_novelty`.

    Returns:
      One reward per row in [-1, 1]; 0 in absent rows.

    Reference: EVOL-RL (2509.15194).
    Certainty: verified
    """
    chex.assert_rank([similarity, agrees, answer_id, group, weight], [2, 1, 1, 1, 1])
    valid = (weight > 0) & (answer_id >= 0)
    won = agrees > 0
    novelty = _novelty(similarity, valid, won, group)
    there = valid.astype(jnp.float32)
    outcome = 2 * group + won
    # Statistics of an outcome within a group: its ids range over twice the number of rows.
    part = jnp.searchsorted(jnp.sort(outcome), outcome).astype(jnp.int32)
    low, high = group_min(novelty, part, there), group_max(novelty, part, there)
    size = group_size(part, there)
    spread = high - low
    scaled = jnp.where(spread > 0, (novelty - low) / jnp.where(spread > 0, spread, 1.0), 0.5)
    band = jnp.where(won, 0.5, -1.0) + 0.5 * scaled
    alone = jnp.where(won, 1.0, -0.5)
    reward = jnp.where(size == 1, alone, band)
    enough = group_size(group, there) > 1
    return jnp.where(weight > 0, jnp.where(valid & enough, reward, -1.0), 0.0)


def _novelty(similarity: Array, valid: Bool[Array, "B"], won: Bool[Array, "B"], group: Array) -> Array:
    others = (group[:, None] == group[None]) & valid[None] & ~jnp.eye(len(group), dtype=bool)
    alike = others & (won[:, None] == won[None])
    alike = jnp.where(alike.any(1, keepdims=True), alike, others)
    mean = jnp.where(alike, similarity, 0.0).sum(1) / jnp.maximum(alike.sum(1), 1)
    most = jnp.where(others, similarity, 0.0).max(1)
    return 1 - (mean + most) / 2


@ranged
def leverage_bonus(
    rewards: Float[Array, "B"],
    embedding: Float[Array, "B D"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    step: Int[Array, ""],
    *,
    beta: NonNegative = 0.01,
    ridge: Positive = 0.01,
    directions: int | None = None,
    leave_one_out: bool = False,
    seed: int = 0,
) -> Float[Array, "B"]:
    """Rewards with a bonus for the sample's leverage among the hidden states of its group.

        h <- h - mean of the group,  S = ridge * I + sum_i h_i h_i^T,  b_i = h_i^T S^-1 h_i
        r_i <- r_i + beta * b_i     in groups with at least one reward above 0

    b lies in [0, 1). With leave_one_out S is without the row itself, which gives b / (1 - b).

    Args:
      rewards: one per row.
      embedding: of each completion (`mean_hidden`).
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      step: training step; the projection is redrawn in each.
      beta: coefficient of the bonus.
      ridge: keeps S regular.
      directions: dimension of a sparse random projection of the embedding (32 or 128); None is no projection. With as
        many directions as samples every bonus tends to 1 - 1 / G and is uninformative.
      leave_one_out: as above.
      seed: of the projection.

    Returns:
      One reward per row; absent rows keep theirs.

    Raises:
      ValueError: for directions below 1.

    Reference: representation-based exploration (2510.11686).
    Certainty: verified
    """
    chex.assert_rank([rewards, embedding, group, weight], [1, 2, 1, 1])
    if directions is not None and directions < 1:
        raise ValueError(f"directions is {directions}; it must be at least 1, or None to keep the embedding")
    states = embedding.astype(jnp.float32)
    if directions is not None:
        key = jax.random.fold_in(jax.random.key(seed), step)
        states = states @ sparse_projection(key, states.shape[1], directions)
    there = jnp.where(weight > 0, 1.0, 0.0)
    states = jnp.where(there[:, None] > 0, states, 0.0)
    size = jnp.maximum(group_sum(there, group, there), 1.0)[:, None]
    total = jax.ops.segment_sum(states, group, num_segments=len(group))[group]
    centred = jnp.where(there[:, None] > 0, states - total / size, 0.0)
    # b from the kernel matrix of the rows [B, B]: h_i^T S^-1 h_i = [K (ridge I + K)^-1]_ii.
    alike = (group[:, None] == group[None]).astype(jnp.float32)
    kernel = (centred @ centred.T) * alike
    solved = jax.scipy.linalg.solve(kernel + ridge * jnp.eye(len(group)), kernel, assume_a="pos")
    bonus = jnp.clip(jnp.diagonal(solved), 0.0, 1.0)
    if leave_one_out:
        bonus = bonus / jnp.maximum(1 - bonus, 1e-6)
    solvable = group_max(rewards, group, weight) > 0
    return jnp.where((weight > 0) & solvable, rewards + beta * bonus, rewards)


def sparse_projection(key: Array, width: int, directions: int) -> Float[Array, "D k"]:
    """A random matrix with entries sqrt(3 / k) * (+1, 0, -1), with probabilities 1/6, 2/3, 1/6."""
    draws = jax.random.choice(key, jnp.array([1.0, -1.0, 0.0, 0.0, 0.0, 0.0]), (width, directions))
    return draws * jnp.sqrt(3.0 / directions)


@ranged
def nearness_to_success(
    embedding: Float[Array, "B D"],
    correct: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    radius: Positive = 0.5,
    most: Share = 0.6,
    steepness: Positive = 10.0,
) -> Float[Array, "B"]:
    """Partial rewards of failures by their distance to the successes of their group.

        success 1;  failure most * sigmoid(steepness * (0.5 - d))

    The embeddings of the successes are standardised per dimension and clustered by density (points within `radius` of
    each other, clusters of two at least); d is the distance of a failure to the nearest centre of a cluster, scaled to
    [0, 1] over the failures of the group (0.5 where they are equally far). Without clusters the centre is the mean of
    the successes. Without a success all failures get 0.

    Args:
      embedding: of each completion.
      correct: 1 where it succeeded.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      radius: of a neighbourhood, in standard deviations.
      most: upper bound of a failure's reward.
      steepness: slope of the sigmoid.

    Returns:
      One reward per row in [0, 1]; 0 in absent rows.

    Reference: SRPO, self-referential policy optimisation (2511.15605).
    Certainty: verified
    """
    chex.assert_rank([embedding, correct, group, weight], [2, 1, 1, 1])
    there, won = weight > 0, (weight > 0) & (correct > 0)
    x = jnp.where(there[:, None], embedding.astype(jnp.float32), 0.0)
    same = group[:, None] == group[None]
    successes = (same & won[None]).astype(jnp.float32)  # of the group of each row
    count = jnp.maximum(successes.sum(1, keepdims=True), 1.0)
    mean = successes @ x / count
    deviation = jnp.sqrt(jnp.maximum(successes @ jnp.square(x) / count - jnp.square(mean), 0.0))
    z = (x - mean) / jnp.where(deviation > 1e-6, deviation, 1.0)
    near = same & won[:, None] & won[None] & (jnp.linalg.norm(z[:, None] - z[None], axis=-1) <= radius)
    core = near.sum(1) >= 2
    reach = near & core[:, None] & core[None]
    for _ in range(max(len(group) - 1, 1).bit_length()):  # paths twice as long each time
        reach = reach | ((reach.astype(jnp.float32) @ reach.astype(jnp.float32)) > 0)
    clusters = core.any() & core[:, None] & reach
    sizes = clusters.sum(1, keepdims=True)
    centres = jnp.where(sizes > 0, clusters.astype(jnp.float32) @ x / jnp.maximum(sizes, 1), mean)
    clustered = (same & core[None]).any(1)
    candidates = same & jnp.where(clustered[:, None], core[None], won[None])
    distance = jnp.linalg.norm(x[:, None] - centres[None], axis=-1)
    nearest = jnp.where(candidates, distance, jnp.inf).min(1)
    failed = (there & ~won & candidates.any(1)).astype(jnp.float32)
    nearest = jnp.where(failed > 0, nearest, 0.0)
    low, high = group_min(nearest, group, failed), group_max(nearest, group, failed)
    spread = high - low
    scaled = jnp.where(spread >= 1e-6, (nearest - low) / jnp.where(spread >= 1e-6, spread, 1.0), 0.5)
    partial = most * jax.nn.sigmoid(steepness * (0.5 - scaled))
    return jnp.where(won, 1.0, jnp.where(failed > 0, partial, 0.0))
