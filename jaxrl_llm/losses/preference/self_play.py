"""Preference losses of iterated self-play: against the last round's policy, towards a Nash policy."""

from __future__ import annotations

from typing import Annotated

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.preference.dpo import smoothed_logistic
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.losses.siblings import compact_ids
from jaxrl_llm.ranges import NonNegative, Positive, Range, ranged


@ranged
def inpo(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    previous_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    eta: Positive = 0.0075,
    tau: Positive = 0.0025,
) -> Loss:
    """INPO: one step of mirror descent from the policy of the last round, regularised towards the reference.

        h = gap(log pi) - tau / eta * gap(log pi_reference) - (eta - tau) / eta * gap(log pi_previous)
        x = (h - 1 / (2 * eta))^2

    averaged over pairs, with gap the difference better - worse of sums over tokens. With tau = eta it is IPO with beta
    = eta.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the fixed base policy.
      previous_logprobs: under the policy of the last round, which generated the pairs (a network `previous`).
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      eta: step of the descent.
      tau: strength of the KL to the reference, at most eta.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` and `margin` (h).

    Raises:
      ValueError: for a tau above eta.

    Reference: INPO (2407.00617).
    Certainty: recalled
    """
    chex.assert_rank([logprobs, reference_logprobs, previous_logprobs, mask, group, preferred], [2, 2, 2, 2, 1, 1])
    if tau > eta:
        raise ValueError(f"tau is {tau} and eta is {eta}; tau must be at most eta")
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    fixed = tau / eta * on_mask(reference_logprobs, mask) + (eta - tau) / eta * on_mask(previous_logprobs, mask)
    h = pairs.gap((on_mask(logprobs, mask) - jax.lax.stop_gradient(fixed)).sum(-1))
    metrics = {"preferred_share": (pairs.total(h > 0), pairs.count), "margin": (pairs.total(h), pairs.count)}
    return Loss(pairs.total(jnp.square(h - 1 / (2 * eta))), pairs.count, metrics)


@ranged
def dno(
    logprobs: Float[Array, "B T"],
    previous_logprobs: Float[Array, "B T"],
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    eta: Positive = 0.1,
) -> Loss:
    """DNO: log-ratios to the policy of the last round are regressed on win rates, pair by pair of a group.

        p = sigmoid(r_1 - r_2)
        z = eta * (gap(log pi) - gap(log pi_previous))
        x = -p log sigmoid(z) - (1 - p) log sigmoid(-z)

    averaged over the pairs of each group. Its optimal policy is proportional to pi_previous * exp(r / eta).

    Args:
      logprobs: log-probability of each token under the current policy.
      previous_logprobs: under the policy of the last round, which generated the answers (a network `previous`).
      rewards: share of wins of each answer against the others (`win_rate`).
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      eta: units of win rate per nat.

    Returns:
      The loss; its count is the (weighted) number of groups with a pair.

    Reference: DNO (2404.03715).
    Certainty: verified
    """
    chex.assert_rank([logprobs, previous_logprobs, mask, rewards, group], [2, 2, 2, 1, 1])
    mask = mask.astype(jnp.float32)
    weights, ids = row_weight(mask), compact_ids(group)
    there = (weights[:, None] > 0) & (weights[None] > 0) & (ids[:, None] == ids[None])
    there &= jnp.arange(len(ids))[:, None] < jnp.arange(len(ids))[None]
    rho = (on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(previous_logprobs, mask))).sum(-1)
    value = jnp.where(weights > 0, jax.lax.stop_gradient(rewards.astype(jnp.float32)), 0.0)
    z = eta * jnp.where(there, rho[:, None] - rho[None], 0.0)
    p = jax.nn.sigmoid(value[:, None] - value[None])
    loss = -(p * jax.nn.log_sigmoid(z) + (1 - p) * jax.nn.log_sigmoid(-z))
    pairs = jax.ops.segment_sum(there.sum(1).astype(jnp.float32), ids, num_segments=len(ids))[ids]
    share = jnp.where(there, (weights[:, None] + weights[None]) / 2 / jnp.maximum(pairs, 1.0)[:, None], 0.0)
    return Loss((share * loss).sum(), share.sum())


@ranged
def nash_md(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    win_share: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    beta: NonNegative = 0.1,
) -> Loss:
    """Nash-MD: policy gradient on wins against a mixture of policy and reference, with a KL to the reference.

        x = sum_t [ beta * sg(log pi - log pi_reference) - (P - 1/2) ] log pi(y_t)

    averaged over answers. The opponents are sampled from the normalised pi^(1 - c) * pi_reference^c.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      win_share: P, probability that a judge prefers the row to its opponent.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      beta: coefficient of the KL to the reference.

    Returns:
      The loss; its count is the (weighted) number of answers.

    Reference: Nash-MD (2312.00886).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask, win_share], [2, 2, 2, 1])
    mask = mask.astype(jnp.float32)
    said, reference = on_mask(logprobs, mask), on_mask(reference_logprobs, mask)
    better = jnp.where(row_weight(mask) > 0, win_share.astype(jnp.float32), 0.5) - 0.5
    factor = jax.lax.stop_gradient(beta * (said - reference) - better[:, None])
    return Loss((mask * factor * said).sum(), row_weight(mask).sum())


@ranged
def optimal_transport(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    beta: Positive = 0.1,
    paired: bool = False,
    label_smoothing: Annotated[float, Range(0, 0.5, open=")")] = 0.0,
) -> Loss:
    """AOT: stochastic dominance of the better answers' scores over those of the worse ones, across the batch.

        paired     d = sort(gap(log pi)) - sort(gap(log pi_reference))
        unpaired   d = sort(rho_better) - sort(rho_worse)
        x_i = -(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i)

    averaged over ranks. Sorting is over the rows differentiated together, so do not use microbatches. Each group has
    one better and one worse answer.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      beta: units of reward per nat.
      paired: as above.
      label_smoothing: share of labels taken for wrong.

    Returns:
      The loss; its count is the (weighted) number of pairs.

    Reference: AOT (2406.05882).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask, group, preferred], [2, 2, 2, 1, 1])
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    there = pairs.share > 0
    partner = jnp.argmax(there, axis=1)
    won = there.any(1)
    said, fixed = on_mask(logprobs, mask).sum(-1), jax.lax.stop_gradient(on_mask(reference_logprobs, mask).sum(-1))
    if paired:
        one, two = said - said[partner], fixed - fixed[partner]
    else:
        rho = said - fixed
        one, two = rho, rho[partner]
    last = jnp.where(won, 0.0, jnp.inf)  # rows that are not better answers sort last
    one, two = (jnp.sort(jnp.where(won, values, 0.0) + last) for values in (one, two))
    ranked = jnp.arange(len(won)) < won.sum()
    gap = jnp.where(ranked, one, 0.0) - jnp.where(ranked, two, 0.0)
    loss = smoothed_logistic(beta * gap, label_smoothing)
    weight = pairs.count / jnp.maximum(won.sum(), 1)
    return Loss(weight * jnp.where(ranked, loss, 0.0).sum(), pairs.count)


@ranged
def token_guided(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    guide_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
) -> Loss:
    """TGDPO: DPO with token weights from a token-level reward model.

        g_t = beta * (log pi_guide - log pi_reference)
        rho_t = log pi - log pi_reference
        x = -log sigmoid( beta sum_t (1 + alpha g_t) rho_t [better] - beta sum_t (1 - alpha g_t) rho_t [worse] )

    averaged over pairs. Tokens of the worse answer with a high guide reward are lowered less. Weights may be negative.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      guide_logprobs: under a model that was trained by a preference loss (a network `guide`), of the same tokenizer.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      beta: units of reward per nat.
      alpha: strength of the guidance; 0 is DPO.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` and `margin`.

    Reference: TGDPO (2506.14574).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, guide_logprobs, mask, group, preferred], [2, 2, 2, 2, 1, 1])
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    reference = jax.lax.stop_gradient(on_mask(reference_logprobs, mask))
    guidance = beta * (jax.lax.stop_gradient(on_mask(guide_logprobs, mask)) - reference)
    sign = jnp.where(preferred == 1, 1.0, -1.0)[:, None]
    z = beta * pairs.gap(((1 + sign * alpha * guidance) * (on_mask(logprobs, mask) - reference)).sum(-1))
    metrics = {"preferred_share": (pairs.total(z > 0), pairs.count), "margin": (pairs.total(z), pairs.count)}
    return Loss(pairs.total(-jax.nn.log_sigmoid(z)), pairs.count, metrics)
