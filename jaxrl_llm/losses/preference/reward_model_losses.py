"""Losses of reward models other than Bradley-Terry: ranked answers, ratings, labels, labels of a weaker model."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.losses.siblings import compact_ids, mean_weight, sibling_sum
from jaxrl_llm.ranges import Share, ranged

RankingForm = Literal["all_pairs", "plackett_luce"]


def ranked_answers(
    reward_scores: Float[Array, "B"],
    rank: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    form: RankingForm = "plackett_luce",
) -> Loss:
    """Ranking loss of several answers to a prompt, ordered from best to worst.

        all_pairs      x = mean over pairs i before j of -log sigmoid(s_i - s_j)
        plackett_luce  x = sum over places k of [ log sum_{j not before k} exp s_j - s_k ]

    averaged over prompts. With two answers both are `bradley_terry`. Answers of equal rank form no pair.

    Args:
      reward_scores: one number per answer, of the network that learns.
      rank: place in the group, 0 is best; below 0 leaves the row out.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      weight: of each row.
      form: as above.

    Returns:
      The loss; its count is the (weighted) number of prompts with two answers. Metric: `preferred_share` of pairs.

    Raises:
      ValueError: for an unknown form.

    Reference: InstructGPT (2203.02155), all pairs; Plackett-Luce as in (2301.11270).
    Certainty: recalled
    """
    chex.assert_equal_shape([reward_scores, rank, group, weight])
    if form not in get_args(RankingForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(RankingForm))}")
    ids, there = compact_ids(group), (weight > 0) & (rank >= 0)
    weights, s = jnp.where(there, weight, 0.0), jnp.where(there, reward_scores.astype(jnp.float32), 0.0)
    both = there[:, None] & there[None] & (ids[:, None] == ids[None])
    before = both & (rank[:, None] < rank[None])
    gap = jnp.where(before, s[:, None] - s[None], 0.0)
    pairs = sibling_sum(before.sum(-1).astype(jnp.float32), ids)
    of_row = jnp.where(before, 1 / jnp.maximum(pairs, 1.0)[:, None], 0.0)
    if form == "all_pairs":
        loss = (of_row * -jax.nn.log_sigmoid(gap)).sum(-1)
    else:
        behind = both & (rank[:, None] <= rank[None])
        loss = jnp.where(there, jax.nn.logsumexp(jnp.where(behind, s[None], -jnp.inf), axis=1, where=behind) - s, 0.0)
    factor = jnp.where(there & (pairs > 0), mean_weight(weights, ids), 0.0)
    rows = sibling_sum(there.astype(jnp.float32), ids)
    count = (factor / jnp.maximum(rows, 1.0)).sum()
    right = (factor * (of_row * (gap > 0)).sum(-1)).sum()
    return Loss((factor * jnp.where(factor > 0, loss, 0.0)).sum(), count, {"preferred_share": (right, count)})


def rating_regression(
    reward_scores: Float[Array, "B *A"], rating: Float[Array, "B *A"], weight: Float[Array, "B"]
) -> Loss:
    """Squared distance of scores from ratings, of one attribute or several.

        x = (s - rating)^2

    averaged over the ratings that are not NaN. Several attributes are the outputs of a head (`reads: {reward_scores:
    reward_values}`); the reward is their weighted sum.

    Args:
      reward_scores: one number per answer, or one per attribute.
      rating: given ratings, such as 0 to 4; NaN where missing.
      weight: of each row.

    Returns:
      The loss; its count is the (weighted) number of ratings.

    Reference: HelpSteer (2311.09528); HelpSteer2 (2406.08673).
    Certainty: verified
    """
    chex.assert_equal_shape([reward_scores, rating])
    rows = jnp.where(weight > 0, weight.astype(jnp.float32), 0.0).reshape(-1, *[1] * (rating.ndim - 1))
    weights = jnp.where(jnp.isnan(rating), 0.0, rows)
    gap = jnp.where(weights > 0, reward_scores.astype(jnp.float32) - rating.astype(jnp.float32), 0.0)
    return Loss((weights * jnp.square(gap)).sum(), weights.sum())


def outcome_cross_entropy(
    reward_scores: Float[Array, "B"], preferred: Float[Array, "B"], weight: Float[Array, "B"]
) -> Loss:
    """An outcome reward model: a score is the log-odds that the answer is right.

        x = -y log sigmoid(s) - (1 - y) log sigmoid(-s)

    averaged over answers.

    Args:
      reward_scores: one number per answer, of the network that learns.
      preferred: y, 1 for a right answer, 0 for a wrong one, between for soft labels; outside [0, 1] leaves the row out.
      weight: of each row.

    Returns:
      The loss; its count is the (weighted) number of answers. Metric: `right_share`.

    Reference: Training verifiers (2110.14168).
    Certainty: verified
    """
    chex.assert_equal_shape([reward_scores, preferred, weight])
    weights = jnp.where((preferred >= 0) & (preferred <= 1), jnp.where(weight > 0, weight, 0.0), 0.0)
    z = jnp.where(weights > 0, reward_scores.astype(jnp.float32), 0.0)
    y = jnp.where(weights > 0, preferred.astype(jnp.float32), 0.0)
    loss = -y * jax.nn.log_sigmoid(z) - (1 - y) * jax.nn.log_sigmoid(-z)
    right = jnp.where((z > 0) == (y > 0.5), weights, 0.0).sum()
    return Loss((weights * loss).sum(), weights.sum(), {"right_share": (right, weights.sum())})


@ranged
def weak_labels(
    reward_scores: Float[Array, "B"],
    weak_share: Float[Array, "B"],
    weight: Float[Array, "B"],
    *,
    confidence: Share = 0.5,
) -> Loss:
    """Cross-entropy with soft labels of a weaker model, mixed with the model's own hard labels.

        p = sigmoid(s),   hard = 1[p >= h],   target = (1 - c) * weak + c * hard
        x = -target log p - (1 - target) log(1 - p)

    averaged over rows. h is the quantile of p at which the hard labels have the weak model's mean share of positives,
    over the rows differentiated together: use batches of at least 32 and no microbatches. Increase c from 0 over the
    first part of training.

    Args:
      reward_scores: log-odds of the positive class, of the network that is trained.
      weak_share: probability of the positive class under the weak model.
      weight: of each row.
      confidence: c; 0 is plain cross-entropy, 0.75 for a large gap between the models.

    Returns:
      The loss; its count is the (weighted) number of rows.

    Raises:
      ValueError: for a confidence outside [0, 1].

    Reference: Weak-to-strong generalisation (2312.09390).
    Certainty: verified
    """
    chex.assert_equal_shape([reward_scores, weak_share, weight])
    there = weight > 0
    z = jnp.where(there, reward_scores.astype(jnp.float32), 0.0)
    weak = jnp.where(there, weak_share.astype(jnp.float32), 0.0)
    p = jnp.where(there, jax.lax.stop_gradient(jax.nn.sigmoid(z)), jnp.nan)
    level = 1 - weak.sum() / jnp.maximum(there.sum(), 1)
    hard = jnp.where(there & (p >= jnp.nanquantile(p, level)), 1.0, 0.0)
    target = (1 - confidence) * weak + confidence * hard
    loss = -target * jax.nn.log_sigmoid(z) - (1 - target) * jax.nn.log_sigmoid(-z)
    weights = jnp.where(there, weight.astype(jnp.float32), 0.0)
    return Loss((weights * loss).sum(), weights.sum())


@ranged
def verdict_ranking(
    yes_logprobs: Float[Array, "B T"],
    yes_mask: Float[Array, "B T"],
    no_logprobs: Float[Array, "B T"],
    no_mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    weight: Float[Array, "B"],
    *,
    cross_entropy: Share = 0.1,
) -> Loss:
    """Loss of a generative reward model whose score is the probability of a yes verdict.

        x = -log sigmoid(r_better - r_worse) - c * (log p_yes + log p_no) / 2

    averaged over pairs, with r the probability of yes, p_yes that of yes after the better answer and p_no that of no
    after the worse one. Views `yes` and `no` append a question on the answer and the verdict.

    Args:
      yes_logprobs, no_logprobs: log-probability of each token of the verdict.
      yes_mask, no_mask: 1 on tokens of the verdict.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      weight: of each row.
      cross_entropy: c, weight of the cross-entropy of the verdicts.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` and `score_gap`.

    Reference: RewardDance (2509.08826), point-wise.
    Certainty: verified
    """
    chex.assert_equal_shape([yes_logprobs, yes_mask])
    chex.assert_equal_shape([no_logprobs, no_mask])
    yes, no = (
        jnp.where(mask > 0, said.astype(jnp.float32), 0.0).sum(-1)
        for said, mask in ((yes_logprobs, yes_mask), (no_logprobs, no_mask))
    )
    yes, no = (jnp.where(weight > 0, value, 0.0) for value in (yes, no))
    pairs = pairs_of(preferred, weight, group)
    gap = pairs.gap(jnp.exp(yes))
    loss = -jax.nn.log_sigmoid(gap) - cross_entropy * (yes[:, None] + no[None]) / 2
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "score_gap": (pairs.total(gap), pairs.count)}
    return Loss(pairs.total(loss), pairs.count, metrics)
