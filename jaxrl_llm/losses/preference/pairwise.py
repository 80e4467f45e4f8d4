"""Pairwise policy gradients: the reward difference of two answers weighs their log-probability gradient."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.losses.siblings import compact_ids, sibling_sum
from jaxrl_llm.ranges import NonNegative, Positive, ranged

PairClip = Literal["separate", "joint"]


@ranged
def pairwise_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    form: PairClip = "joint",
    clip: NonNegative = 0.2,
    log_ratio_limit: Positive = 10.0,
) -> Loss:
    """P3O: proximal policy optimisation on pairs of answers to a prompt.

    With w = exp(sum_t(log pi - log pi_old)) of an answer, for each pair (i, j) of a prompt:

        separate (V1)   (x_ij + x_ji) / 2,   x_ij = max(-a w_i, -a clip(w_i, 1 - clip, 1 + clip)),
                        a = sg((r_i - r_j) * w_j)
        joint (V2)      max(-c l, -c clip(l, -clip, clip)),   l = log(w_i / w_j),  c = sg((r_i - r_j) w_i w_j) / 2

    averaged over the pairs of a prompt, then over prompts by their number of answers. A constant added to the rewards
    of a prompt changes nothing. On fresh samples the gradient is that of leave-one-out REINFORCE averaged over
    sequences, for any number of answers. Rewards should include the divergence from the reference
    (`kl_penalized_sequence_rewards`). A prompt with one answer has no pair and is absent.

    The clip forms, and the average over more than two answers, are our reading.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      rewards: total reward of each row.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      form: clips each ratio ('separate') or the ratio of both ('joint').
      clip: distance from 1 (separate), or largest |l| (joint).
      log_ratio_limit: bound of |log w| before exp.

    Returns:
      The loss; its count is the weight of rows that have a partner.

    Raises:
      ValueError: for an unknown form or a negative clip.

    Reference: P3O (2310.00212).
    Certainty: recalled
    """
    chex.assert_rank([logprobs, old_logprobs, mask, rewards, group], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    if form not in get_args(PairClip):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(PairClip))}")
    weights, ids = row_weight(mask.astype(jnp.float32)), compact_ids(group)
    pairs, partnered = _pair_weights(weights, ids)
    difference = on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(old_logprobs, mask))
    log_w = jnp.clip(jnp.clip(difference, -1e4, 1e4).sum(-1), -log_ratio_limit, log_ratio_limit)
    rewards = jax.lax.stop_gradient(jnp.where(weights > 0, rewards.astype(jnp.float32), 0.0))
    gap = rewards[:, None] - rewards[None, :]
    ratio = jnp.exp(log_w)
    if form == "separate":
        signal = jax.lax.stop_gradient(gap * ratio[None, :])
        limited = jnp.clip(ratio, 1 - clip, 1 + clip)
        loss = jnp.maximum(-signal * ratio[:, None], -signal * limited[:, None])
    else:
        signal = 0.5 * jax.lax.stop_gradient(gap * ratio[:, None] * ratio[None, :])
        log_odds = log_w[:, None] - log_w[None, :]
        loss = jnp.maximum(-signal * log_odds, -signal * jnp.clip(log_odds, -clip, clip))
    return Loss((pairs * loss).sum(), jnp.where(partnered, weights, 0.0).sum())


@ranged
def kl_penalized_sequence_rewards(
    rewards: Float[Array, "B"],
    old_logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    kl_coefficient: NonNegative = 0.1,
) -> Float[Array, "B"]:
    """Rewards minus the divergence of the whole completion from the reference.

        r - kl_coefficient * sum_t (log pi_old - log pi_reference)

    Args:
      rewards: total reward of each row.
      old_logprobs: log-probability of each token under the policy that the update starts from.
      reference_logprobs: under the reference policy.
      mask: non-zero on tokens that count.
      kl_coefficient: units of reward per nat.

    Returns:
      One reward per row.

    Reference: P3O (2310.00212).
    Certainty: recalled
    """
    chex.assert_rank([rewards, old_logprobs, reference_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([old_logprobs, reference_logprobs, mask])
    divergence = (on_mask(old_logprobs, mask) - on_mask(reference_logprobs, mask)).sum(-1)
    return rewards.astype(jnp.float32) - kl_coefficient * divergence


def _pair_weights(weights: Array, ids: Array) -> tuple[Array, Array]:
    """(weight of each ordered pair, mask of rows with a partner); a group's pairs sum to the weight of its rows."""
    count = sibling_sum((weights > 0).astype(jnp.float32), ids)
    partnered = (weights > 0) & (count > 1)
    same = (ids[:, None] == ids[None, :]) & ~jnp.eye(len(ids), dtype=bool)
    products = jnp.where(same, weights[:, None] * weights[None, :], 0.0)
    total = sibling_sum(products.sum(-1), ids)
    return products * (sibling_sum(weights, ids) / jnp.where(total > 0, total, 1.0))[:, None], partnered
