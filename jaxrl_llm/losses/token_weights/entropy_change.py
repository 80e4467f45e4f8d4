"""Weights of tokens: credit functions that fill `token_weight` before the update."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from jaxrl_llm.ranges import Positive, ranged

ChangeWeight = Literal["linear", "exponential"]


def predicted_entropy_change(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """Predicted change of the policy's entropy at a token by an update on it, up to the step size.

        Omega = |A / pi_old * pi * (1 - pi) * (log pi + H)|

    H is the entropy over the vocabulary. Raising a token with log pi > -H lowers the entropy, raising a rarer one
    increases it. Outside the mask and where not finite it is 0; it carries no gradient.
    """
    chex.assert_rank([logprobs, old_logprobs, entropy, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, entropy, advantages, mask])
    least = jnp.log(1e-8)
    lp, old = (jnp.clip(x.astype(jnp.float32), least, 0.0) for x in (logprobs, old_logprobs))
    others = jnp.maximum(-jnp.expm1(lp), 1e-8)
    change = jnp.abs(advantages.astype(jnp.float32) * jnp.exp(lp - old) * others * (lp + entropy.astype(jnp.float32)))
    return stop_gradient(jnp.where((mask > 0) & jnp.isfinite(change), change, 0.0))


@ranged
def weights_of_change(
    change: Float[Array, "B T"],
    counted: Array,
    *,
    form: ChangeWeight = "linear",
    low: Positive = 0.8,
    high: Positive = 1.2,
) -> Float[Array, "B T"]:
    """Weights that fall with the predicted change of entropy; see `entropy_change_weights`. 0 where not counted."""
    largest = jnp.max(jnp.where(counted, change, 0.0), initial=0.0)
    if form == "linear":
        smallest = jnp.minimum(jnp.min(jnp.where(counted, change, jnp.inf), initial=jnp.inf), largest)
        spread = largest - smallest
        share = jnp.where(spread > 0, (change - smallest) / jnp.where(spread > 0, spread, 1.0), 0.5)
        weights = high - share * (high - low)
    else:
        rate = -jnp.log(low) / jnp.maximum(largest, 0.02)
        weights = jnp.clip(jnp.exp(-rate * change), low, 1.0)
    return jnp.where(counted, weights, 0.0)


@ranged
def entropy_change_weights(
    old_logprobs: Float[Array, "B T"],
    old_entropy: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    form: ChangeWeight = "linear",
    low: Positive = 0.8,
    high: Positive = 1.2,
) -> Float[Array, "B T"]:
    """Smaller weights for tokens whose update would change the policy's entropy more.

        Omega = |A * (1 - pi) * (log pi + H)|    with pi and H of the policy that the update starts from

        linear        w = high - (Omega - min Omega) / (max Omega - min Omega) * (high - low), or (low + high) / 2 where
                      all are equal
        exponential   w = clip(exp(-k * Omega), low, 1),   k = -log(low) / max(max Omega, 0.02)

    min and max run over the counted tokens of the whole batch, so any split into microbatches trains on the same
    weights. The released code takes them over a microbatch and from the current policy, with Omega multiplied by the
    importance ratio; on the first update of a batch both policies are the same.

    Args:
      old_logprobs: log-probability of each token under the policy that the update starts from.
      old_entropy: entropy of that policy over the vocabulary, in nats.
      advantages: advantage of each token.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      token_weight: factors found so far; None is 1.
      form: how weights fall with Omega.
      low: the smallest weight.
      high: the largest one of the linear form.

    Returns:
      The new `token_weight`; 0 outside the mask and in absent rows.

    Raises:
      ValueError: for an unknown form, or bounds that are not 0 < low <= 1 <= high.

    Reference: STEER (2510.10150).
    Certainty: verified
    """
    if form not in get_args(ChangeWeight):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(ChangeWeight))}")
    if not 0 < low <= 1 <= high:
        raise ValueError(f"low is {low} and high is {high}; weights vary around 1, so 0 < low <= 1 <= high")
    counted = (mask > 0) & (weight > 0)[:, None]
    change = predicted_entropy_change(old_logprobs, old_logprobs, old_entropy, advantages, counted)
    result = weights_of_change(change, counted, form=form, low=low, high=high)
    if token_weight is not None:
        result = result * jnp.where(counted, token_weight.astype(jnp.float32), 0.0)
    return stop_gradient(result)
