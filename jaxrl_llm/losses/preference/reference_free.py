"""Preference losses without a reference: answers are compared by their mean token log-likelihood."""

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
from jaxrl_llm.ranges import NonNegative, Positive, Range, ranged


@ranged
def simpo(
    logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    beta: Positive = 2.0,
    margin: NonNegative = 1.0,
    alpha: float = 0.0,
    length_normalised: bool = True,
    label_smoothing: Annotated[float, Range(0, 0.5, open=")")] = 0.0,
) -> Loss:
    """SimPO: the mean log-probability of the better answer exceeds that of the worse one by a margin.

        x = -log sigmoid( beta * (a_better - a_worse) - margin ),   a = mean_t log pi(y_t)

    averaged over pairs. AlphaPO has (1 - exp(-alpha a)) / alpha in place of a; alpha 0 is SimPO. CPO has
    length_normalised False and margin 0, plus `preferred_likelihood`.

    Args:
      logprobs: log-probability of each token under the current policy.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      beta: units of reward per nat, 2 to 10.
      margin: in units of beta * a; some code has margin / beta instead, 0.5.
      alpha: of AlphaPO, 0.25.
      length_normalised: a is a mean; else the sum.
      label_smoothing: share of labels taken for wrong.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` and `margin`.

    Reference: SimPO (2405.14734); AlphaPO (2501.03884); CPO (2401.08417).
    Certainty: verified
    """
    chex.assert_rank([logprobs, mask, group, preferred], [2, 2, 1, 1])
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    a = _likelihood(logprobs, mask) if length_normalised else on_mask(logprobs, mask).sum(-1)
    if alpha:
        a = (1 - jnp.exp(jnp.minimum(-alpha * a, 80.0))) / alpha
    gap = beta * pairs.gap(a)
    loss = smoothed_logistic(gap - margin, label_smoothing)
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "margin": (pairs.total(gap), pairs.count)}
    return Loss(pairs.total(loss), pairs.count, metrics)


def odds_ratio(
    logprobs: Float[Array, "B T"], group: Int[Array, "B"], preferred: Float[Array, "B"], mask: Float[Array, "B T"]
) -> Loss:
    """ORPO: log-odds ratio of the two answers from mean token log-probabilities; add `preferred_likelihood`.

        x = -log sigmoid( log odds_better - log odds_worse ),   log odds = a - log(1 - exp(a)),  a = mean_t log pi(y_t)

    averaged over pairs. ORPO is preferred_likelihood + 0.1 * odds_ratio.

    Args:
      logprobs: log-probability of each token under the current policy.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` and `log_odds_ratio`.

    Reference: ORPO (2403.07691).
    Certainty: verified
    """
    chex.assert_rank([logprobs, mask, group, preferred], [2, 2, 1, 1])
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    a = jnp.minimum(_likelihood(logprobs, mask), -1e-6)  # the odds of probability 1 are infinite
    # log(1 - exp(a)) without cancellation on either side of log 1/2.
    near = a > -0.6931472
    rest = jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, a, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, a))))
    log_odds = pairs.gap(a - rest)
    metrics = {
        "preferred_share": (pairs.total(log_odds > 0), pairs.count),
        "log_odds_ratio": (pairs.total(log_odds), pairs.count),
    }
    return Loss(pairs.total(-jax.nn.log_sigmoid(log_odds)), pairs.count, metrics)


def _likelihood(logprobs: Array, mask: Array) -> Array:
    return on_mask(logprobs, mask).sum(-1) / jnp.maximum((mask > 0).sum(-1), 1)
