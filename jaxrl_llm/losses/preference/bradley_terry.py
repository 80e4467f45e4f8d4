"""Bradley-Terry reward models: losses that give the better answer of a pair the higher score."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.preference.dpo import smoothed_logistic
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.ranges import NonNegative, Range, ranged

Centring = Literal["sum", "each"]
MarginUse = Literal["shift", "weight"]


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
