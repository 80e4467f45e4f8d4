"""Direct preference optimisation: the log-ratios of policy to reference are the rewards of a Bradley-Terry model."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.ranges import Positive, Range, ranged

Link = Literal["logistic", "robust", "hinge", "square"]


@ranged
def dpo(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Range(0, 0.5, open=")")] = 0.0,
    link: Link = "logistic",
    length_normalised: bool = False,
) -> Loss:
    """DPO: the better answer of a pair gains on the reference, the worse one loses.

    With rho = sum_t(log pi - log pi_reference) of an answer and z = beta * (rho_better - rho_worse), for each pair

        logistic   x = -(1 - e) * log sigmoid(z) - e * log sigmoid(-z)
        robust     x = (-(1 - e) * log sigmoid(z) + e * log sigmoid(-z)) / (1 - 2 * e)
        hinge      x = max(0, 1 - z)
        square     x = (rho_better - rho_worse - 1 / (2 * beta))^2

    averaged over pairs. e is `label_smoothing`: above 0, logistic is conservative DPO, whose best margin is finite;
    robust takes e for the share of labels that are flipped and is an estimate of the loss on true ones that is right on
    average (it may be negative). hinge is that of SLiC and RSO; square is IPO, whose authors train it on mean
    log-ratios. Where the policy is the reference, a logistic pair costs log 2.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      group: id of the group each row belongs to; naming it keeps groups whole.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      beta: units of reward a nat; small values let the policy go far.
      label_smoothing: share of labels taken for wrong, below 1/2; of logistic and robust alone.
      link: from margin to loss.
      length_normalised: rho is a mean over the tokens of an answer; beta is then some 10 to 50 times larger.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` (pairs whose better answer has
      the larger rho) and `margin` (z, or the gap of rho for square).

    Raises:
      ValueError: for an unknown link, a beta that is not positive, or a smoothing outside [0, 1/2), or that the link
        has no use for.

    Reference: DPO (2305.18290); robust: (2403.00409); hinge: SLiC-HF (2305.10425), RSO (2309.06657); square: IPO
      (2310.12036).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask, group, preferred], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([logprobs, reference_logprobs, mask])
    if link not in get_args(Link):
        raise ValueError(f"link is {link!r}; it must be one of {', '.join(get_args(Link))}")
    if label_smoothing and link not in ("logistic", "robust"):
        raise ValueError(f"label_smoothing is {label_smoothing}, which link {link!r} has no use for; leave it out")
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    rho = (on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))).sum(-1)
    if length_normalised:
        rho = rho / jnp.maximum((mask > 0).sum(-1), 1)
    gap = pairs.gap(rho)
    z = gap if link == "square" else beta * gap
    match link:
        case "hinge":
            loss = jnp.maximum(0.0, 1 - z)
        case "square":
            loss = (gap - 1 / (2 * beta)) ** 2
        case "robust":
            right, wrong = -jax.nn.log_sigmoid(z), -jax.nn.log_sigmoid(-z)
            loss = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
        case _:
            loss = smoothed_logistic(z, label_smoothing)
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "margin": (pairs.total(z), pairs.count)}
    return Loss(pairs.total(loss), pairs.count, metrics)


def smoothed_logistic(z: Float[Array, "*B"], label_smoothing: float) -> Float[Array, "*B"]:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), the cross-entropy of a margin with a share e of wrong labels."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)
