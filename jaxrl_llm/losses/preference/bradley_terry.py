"""Bradley-Terry reward models: losses that give the better answer of a pair the higher score."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.preference.dpo import smoothed_logistic
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.ranges import Count, NonNegative, Range, ranged
from jaxrl_llm.statistics import gaussian_heads

Centring = Literal["sum", "each"]
MarginUse = Literal["shift", "weight"]
GaussianForm = Literal["marginal", "expected"]


@ranged
def bradley_terry(
    reward_scores: Float[Array, "B"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    weight: Float[Array, "B"],
    margin: Float[Array, "B"] | None = None,
    *,
    label_smoothing: Annotated[float, Range(0, 0.5, open=")")] = 0.0,
    centring: NonNegative = 0.0,
    form: Centring = "sum",
    margin_use: MarginUse = "shift",
) -> Loss:
    """Bradley-Terry: the log-odds that one answer is better than another are the difference of their scores.

        z = s_better - s_worse - margin
        x = -(1 - e) * log sigmoid(z) - e * log sigmoid(-z) + centring * c

    averaged over pairs (with margin_use "weight", z has no margin and margin * x is averaged), with
    e = `label_smoothing` and

        sum    c = (s_better + s_worse)^2
        each   c = (s_better^2 + s_worse^2) / 2

    A constant added to both scores of a prompt changes nothing, so scores of different prompts are not comparable
    unless centring holds them near 0. Train for one epoch; more overfit.

    Args:
      reward_scores: one number per answer, of the network that is trained.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      weight: of each row.
      margin: how much better, on the row of the better answer, such as 1 to 3 for graded preferences; None is 0.
      label_smoothing: assumed share of wrong labels, below 1/2.
      centring: coefficient of the penalty that centres scores at 0, such as 0.01.
      form: of that penalty.
      margin_use: a shift of z, or the weight of the pair (scaled Bradley-Terry of HelpSteer2-Preference), which acts
        like repeating the pair, but the pair is counted once.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` (pairs whose better answer has
      the higher score; ties excluded) and `score_gap`.

    Raises:
      ValueError: for an unknown form or use of the margin, margins as weights without margins, a smoothing outside
        [0, 1/2), or a negative centring.

    Reference: Bradley-Terry reward models as in InstructGPT (2203.02155); margin: Llama 2 (2307.09288); centring by
      the sum: (2312.09244); weight: HelpSteer2-Preference (2410.01257); on answers of one policy against another's:
      POLAR (2507.05197).
    Certainty: verified
    """
    chex.assert_rank([reward_scores, group, preferred, weight], 1)
    chex.assert_equal_shape([reward_scores, group, preferred, weight])
    if form not in get_args(Centring):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Centring))}")
    if margin_use not in get_args(MarginUse):
        raise ValueError(f"margin_use is {margin_use!r}; it must be one of {', '.join(get_args(MarginUse))}")
    if margin is None and margin_use == "weight":
        raise ValueError(
            "margin_use is 'weight', but no pair has a margin; give the file a column margin or preference_strength, "
            "fill margin in credit (reward_gap), or leave margin_use out"
        )
    pairs = pairs_of(preferred, weight, group)
    scores = jnp.where(weight > 0, reward_scores.astype(jnp.float32), 0.0)
    gap = pairs.gap(scores)
    z = gap if margin is None or margin_use == "weight" else gap - margin.astype(jnp.float32)[:, None]
    loss = smoothed_logistic(jnp.where(pairs.share > 0, z, 0.0), label_smoothing)
    if centring:
        better, worse = scores[:, None], scores[None, :]
        loss = loss + centring * ((better + worse) ** 2 if form == "sum" else (better**2 + worse**2) / 2)
    if margin is not None and margin_use == "weight":
        loss = loss * margin.astype(jnp.float32)[:, None]
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "score_gap": (pairs.total(gap), pairs.count)}
    return Loss(pairs.total(loss), pairs.count, metrics)


@ranged
def gaussian_bradley_terry(
    reward_scores: Float[Array, "B 2K"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    weight: Float[Array, "B"],
    *,
    form: GaussianForm = "marginal",
    nodes: Count = 24,
) -> Loss:
    """Bradley-Terry with scores that are Gaussian: each of K heads states a mean and a deviation of the score.

        z ~ Normal(m_better - m_worse, v_better + v_worse)
        marginal   x = -log E sigmoid(z)
        expected   x = -E log sigmoid(z)

    averaged over pairs and heads, with v the squared deviation. The expectation is a sum over the nodes of a
    Gauss-Hermite quadrature, not over samples. `marginal` is the likelihood of the label: the deviation is larger where
    labels contradict each other. For `expected`, the loss of a sampled score, any deviation costs (log sigmoid is
    concave), so that all deviations shrink.

    Args:
      reward_scores: outputs of a head with an even number of outputs: K means, then K logarithms of deviations.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      weight: of each row.
      form: as above.
      nodes: of the quadrature; 24 are exact to 1e-5 for deviations of z up to 4.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` (pairs whose better answer has
      the higher mean over heads; ties excluded), `score_gap`, and `deviation` of the scores in pairs.

    Raises:
      ValueError: for an odd number of outputs, or an unknown form.

    Reference: PURM (2503.22480), marginal; Reward-robust RLHF (2409.15360), heads with a sampled score, expected.
    Certainty: reconstructed
    """
    if form not in get_args(GaussianForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(GaussianForm))}")
    mean, deviation = gaussian_heads(jnp.where(weight[:, None] > 0, reward_scores, 0.0))
    variance = jnp.square(deviation)
    pairs = pairs_of(preferred, weight, group)
    points, shares = np.polynomial.hermite_e.hermegauss(nodes)
    log_shares = jnp.asarray(np.log(shares / shares.sum()), jnp.float32)

    def of_head(mean: Float[Array, "B"], variance: Float[Array, "B"]) -> Float[Array, "B B"]:
        spread = jnp.sqrt(variance[:, None] + variance[None, :])
        z = pairs.gap(mean)[..., None] + spread[..., None] * jnp.asarray(points, jnp.float32)
        if form == "marginal":
            return -jax.nn.logsumexp(log_shares + jax.nn.log_sigmoid(z), axis=-1)
        return -(jnp.exp(log_shares) * jax.nn.log_sigmoid(z)).sum(-1)

    heads = range(mean.shape[1])
    loss = sum((of_head(mean[:, k], variance[:, k]) for k in heads), jnp.float32(0.0)) / len(heads)
    gap, spread = pairs.gap(mean.mean(1)), deviation.mean(1)
    metrics = {
        "preferred_share": (pairs.total(gap > 0), pairs.count),
        "score_gap": (pairs.total(gap), pairs.count),
        "deviation": (pairs.total((spread[:, None] + spread[None, :]) / 2), pairs.count),
    }
    return Loss(pairs.total(loss), pairs.count, metrics)
