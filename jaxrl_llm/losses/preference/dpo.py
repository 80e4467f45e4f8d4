"""Direct preference optimisation: the log-ratios of policy to reference are the rewards of a Bradley-Terry model."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.ranges import NonNegative, Positive, Range, Share, ranged

Link = Literal["logistic", "robust", "hinge", "square", "exo", "discopop"]
Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]
_SMOOTHED = ("logistic", "robust", "exo")


@ranged
def dpo(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    pair_weight: Float[Array, "B"] | None = None,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Range(0, 0.5, open=")")] = 0.0,
    link: Link = "logistic",
    length_normalised: bool = False,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    length_penalty: NonNegative = 0.0,
    surplus: Share = 1.0,
    gate_temperature: Positive = 0.05,
) -> Loss:
    """DPO: raises the log-ratio to the reference of the better answer of a pair and lowers that of the worse one.

    With rho = sum_t(log pi - log pi_reference) of an answer, s = rho and
    z = beta * (s_better - s_worse) + length_penalty * (length_better - length_worse), for each pair

        logistic   x = -(1 - e) * log sigmoid(z) - e * log sigmoid(-z)
        robust     x = (-(1 - e) * log sigmoid(z) + e * log sigmoid(-z)) / (1 - 2 * e)
        hinge      x = max(0, 1 - z)
        square     x = (s_better - s_worse - 1 / (2 * beta))^2
        exo        x = KL([q, 1 - q] || [1 - e, e]),  q = sigmoid(z)
        discopop   x = -(1 - g) * log sigmoid(z) + g * exp(-z),  g = sigmoid(z / gate_temperature)

    averaged over pairs. e is `label_smoothing`: above 0, logistic is conservative DPO, whose optimal margin is finite;
    robust is an unbiased estimate of the loss on clean labels if a share e is flipped (it may be negative); exo needs e
    above 0 (1e-3). hinge is that of SLiC and RSO; square is IPO, whose authors train it with `length_normalised`. Where
    the policy equals the reference, the loss of a logistic pair is log 2.

    Other divergences from the reference than the reverse KL change the score:

        forward_kl       s = 1 - exp(-rho)
        jensen_shannon   s = log 2 + log sigmoid(rho)
        alpha            s = (exp((alpha - 1) rho) - 1) / (alpha - 1);  alpha -> 1 is the reverse, 0 the forward KL

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      pair_weight: factor of each row; a pair has the product of both and is counted once (WPO: `off_policy_weight`).
      beta: units of reward per nat; smaller values allow a larger distance from the reference.
      label_smoothing: assumed share of wrong labels, below 1/2; for logistic, robust and exo only.
      link: from margin to loss.
      length_normalised: s is divided by the tokens of an answer; beta is then some 10 to 50 times larger.
      divergence: as above.
      alpha: of the divergence "alpha".
      length_penalty: per token, in units of z; lowers the gradient of pairs whose better answer is longer (R-DPO, 0.01
        to 0.05).
      surplus: weight of the tokens beyond the shorter answer's length (LD-DPO, 0.5); 1 is full weight.
      gate_temperature: temperature of the gate g of discopop.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` (pairs whose better answer has
      the larger s) and `margin` (z, or the gap of s for square).

    Raises:
      ValueError: for an unknown link or divergence, numbers out of range, or a smoothing with a link that ignores it.

    Reference: DPO (2305.18290); robust: (2403.00409); hinge: SLiC-HF (2305.10425), RSO (2309.06657); square: IPO
      (2310.12036); exo: (2402.00856); discopop: (2406.08414); divergences: f-DPO (2309.16240); R-DPO (2403.19159);
      LD-DPO (2409.06411); WPO (2406.11827).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask, group, preferred], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([logprobs, reference_logprobs, mask])
    for name, value, known in (("link", link, Link), ("divergence", divergence, Divergence)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(known))}")
    if label_smoothing and link not in _SMOOTHED:
        raise ValueError(f"label_smoothing is {label_smoothing}, but link {link!r} does not use it; leave it out")
    if link == "exo" and not label_smoothing:
        raise ValueError("label_smoothing is 0, where link 'exo' is infinite; set it above 0, such as 1e-3")
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    ratios = on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))
    length = (mask > 0).sum(-1).astype(jnp.float32)
    counted = jnp.maximum(length, 1) if length_normalised else jnp.ones_like(length)
    if surplus < 1:  # the score of an answer depends on its partner
        score = score_of(surplus_sums(ratios, mask, surplus), divergence, alpha)
        gap = pairs.of_both(score / counted[:, None])
    else:
        gap = pairs.gap(score_of(ratios.sum(-1), divergence, alpha) / counted)
    z = gap if link == "square" else beta * gap + length_penalty * pairs.gap(length)
    loss = linked(z, link, beta=beta, label_smoothing=label_smoothing, gate_temperature=gate_temperature)
    if pair_weight is not None:
        factor = jax.lax.stop_gradient(jnp.where(row_weight(mask) > 0, pair_weight.astype(jnp.float32), 0.0))
        loss = loss * factor[:, None] * factor[None, :]
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "margin": (pairs.total(z), pairs.count)}
    return Loss(pairs.total(loss), pairs.count, metrics)


def linked(
    z: Float[Array, "*B"], link: Link, *, beta: float, label_smoothing: float, gate_temperature: float
) -> Float[Array, "*B"]:
    """The loss of margins z by one of the links of `dpo`; of square, z is the gap of scores."""
    e = label_smoothing
    right, wrong = -jax.nn.log_sigmoid(z), -jax.nn.log_sigmoid(-z)
    match link:
        case "hinge":
            return jnp.maximum(0.0, 1 - z)
        case "square":
            return (z - 1 / (2 * beta)) ** 2
        case "robust":
            return ((1 - e) * right - e * wrong) / (1 - 2 * e)
        case "exo":
            q = jax.nn.sigmoid(z)
            return q * (-right - math.log1p(-e)) + (1 - q) * (-wrong - math.log(e))
        case "discopop":
            gate = jax.nn.sigmoid(z / gate_temperature)
            # Where exp(-z) would overflow, the gate is 0.
            return (1 - gate) * right + gate * jnp.exp(jnp.minimum(-z, _LARGEST))
        case _:
            return smoothed_logistic(z, e)


def score_of(rho: Float[Array, "B"], divergence: Divergence, alpha: float) -> Float[Array, "B"]:
    """The implicit reward over beta, f'(exp(rho)) up to a constant, under a divergence from the reference."""
    if divergence == "forward_kl" or (divergence == "alpha" and alpha == 0):
        return 1 - jnp.exp(jnp.minimum(-rho, _LARGEST))
    if divergence == "jensen_shannon":
        return math.log(2) + jax.nn.log_sigmoid(rho)
    if divergence == "alpha" and abs(alpha - 1) >= 1e-6:
        return (jnp.exp(jnp.minimum((alpha - 1) * rho, _LARGEST)) - 1) / (alpha - 1)
    return rho


_LARGEST = 80.0  # exponent in float32


def surplus_sums(ratios: Float[Array, "B T"], mask: Float[Array, "B T"], surplus: float) -> Float[Array, "B B"]:
    """Sums of each row, with the tokens beyond the shorter length of row and column weighted by `surplus`."""
    counted = mask > 0
    place = jnp.cumsum(counted, axis=1)
    length = place[:, -1]
    along = jnp.cumsum(jnp.where(counted, ratios, 0.0), axis=1)
    common = jnp.minimum(length[:, None], length[None, :])
    # The sum up to the n-th counted token.
    upto = jax.vmap(lambda p, s, n: jnp.where(n > 0, s[jnp.searchsorted(p, n)], 0.0))(place, along, common)
    return upto + surplus * (along[:, -1:] - upto)


def smoothed_logistic(z: Float[Array, "*B"], label_smoothing: float) -> Float[Array, "*B"]:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), the cross-entropy of a margin with a share e of wrong labels."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)
