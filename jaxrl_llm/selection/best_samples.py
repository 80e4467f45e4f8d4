"""Rejection sampling: samples that are kept as supervised targets, and a score for its settings."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, Positive, ranged
from jaxrl_llm.statistics import group_rank, group_size, group_sum


@ranged
def kept_samples(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    keep: Count | None = None,
    threshold: float | None = None,
) -> Float[Array, "B"]:
    """Weights that keep the best samples of each prompt.

    A sample is kept if its reward exceeds the threshold and fewer than `keep` samples of its group have a larger
    reward. With `negative_log_likelihood` this is RAFT (keep 1), STaR and rejection-sampling fine-tuning (threshold 0.5
    of a reward of 0 or 1), and ReST (a threshold that grows from stage to stage). Of equal rewards the first sample is
    kept.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      keep: most samples kept per prompt; None keeps all above the threshold.
      threshold: value that the reward must exceed; None sets no bound.

    Returns:
      The new weight of each row.

    Raises:
      ValueError: without `keep` and `threshold`.

    >>> scores, group = jnp.array([0.1, 0.9, 0.5, 0.7, 0.2, 0.3]), jnp.array([0, 0, 0, 1, 1, 1])
    >>> kept_samples(scores, group, jnp.ones(6), keep=1).tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]

    Reference: RAFT (2304.06767); STaR (2203.14465); ReST (2308.08998).
    Certainty: recalled
    """
    chex.assert_rank([rewards, group, weight], 1)
    chex.assert_equal_shape([rewards, group, weight])
    if keep is None and threshold is None:
        raise ValueError("keep and threshold are both missing, so all samples would be kept; give one of them")
    kept = weight > 0
    if threshold is not None:
        kept &= rewards > threshold
    if keep is not None:
        kept &= group_rank(-rewards.astype(jnp.float32), group, weight) < keep
    return jnp.where(kept, weight.astype(jnp.float32), 0.0)


@ranged
def balance_score(
    rewards: Float[Array, "B"],
    correct: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    threshold: float = 0.0,
    enough: Positive = 8.0,
) -> Float[Array, "B"]:
    """Balance score of sampling and selection for a prompt: many right samples, and few wrong ones among the selected.

        bs = min(n' / n*, 1) * n' / n

    with n selected samples of the prompt (reward above the threshold), n' of them right, and n* = `enough`; 0 where no
    sample is selected. In each iteration B-STaR takes the temperature and threshold of the largest mean score
    (`best_setting`).

    Args:
      rewards: reward of each row; in B-STaR 1 for a right answer plus a fifth of the smallest score of its steps.
      correct: positive for a right answer.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      threshold: value that the reward of a selected sample exceeds.
      enough: n*, intended number of right samples per prompt.

    Returns:
      The score of each row's prompt.

    >>> rewards, correct = jnp.array([1.2, 1.1, 0.1, -0.2]), jnp.array([1, 1, 0, 0])
    >>> round(float(balance_score(rewards, correct, jnp.zeros(4, int), jnp.ones(4))[0]), 6)
    0.166667

    Reference: B-STaR (2412.17256).
    Certainty: verified
    """
    chex.assert_rank([rewards, correct, group, weight], 1)
    selected = ((weight > 0) & (rewards > threshold)).astype(jnp.float32)
    count = group_size(group, selected).astype(jnp.float32)
    right = group_sum((correct > 0).astype(jnp.float32), group, selected)
    return jnp.where(count > 0, jnp.minimum(right / enough, 1.0) * right / jnp.maximum(count, 1.0), 0.0)


def best_setting(scores: Float[Array, "*G"]) -> tuple[int, ...]:
    """Index of the largest mean balance score in a grid of settings; the first of equal ones.

    Args:
      scores: mean score of each setting, such as [temperatures, thresholds].

    Returns:
      One index per axis.

    >>> best_setting(jnp.array([[0.1, 0.4], [0.4, 0.2]]))
    (0, 1)

    Reference: B-STaR (2412.17256).
    Certainty: verified
    """
    return tuple(int(place) for place in jnp.unravel_index(jnp.argmax(scores), scores.shape))
