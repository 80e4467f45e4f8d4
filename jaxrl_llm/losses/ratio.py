"""Importance ratios and their clipping, which the policy losses share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.ranges import NonNegative, Positive, ranged


def on_mask(values: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`values` in float32, exactly 0 (with zero gradient) outside the mask, even for non-finite values."""
    return jnp.where(mask > 0, values.astype(jnp.float32), 0.0)


@ranged
def log_ratio(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    log_ratio_limit: Positive = 20.0,
) -> Float[Array, "B T"]:
    """log(pi / pi_old) of each token, clipped to +-`log_ratio_limit` and 0 outside the mask.

    The clip keeps exp finite: outside it the value is constant and the gradient 0.
    """
    difference = logprobs.astype(jnp.float32) - jax.lax.stop_gradient(old_logprobs.astype(jnp.float32))
    return jnp.clip(on_mask(difference, mask), -log_ratio_limit, log_ratio_limit)


def constant_factor(
    values: Float[Array, "B T"], mask: Float[Array, "B T"], token_weight: Float[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """`values`, times the weight if there is one, as a float32 constant that is 0 outside the mask."""
    factor = on_mask(values, mask)
    if token_weight is not None:
        factor = factor * on_mask(token_weight, mask)
    return jax.lax.stop_gradient(factor)


@ranged
def pessimistic_surrogate(
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_low: NonNegative,
    clip_high: NonNegative,
    ratio_cap: Positive | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """max(-A * min(r, cap), -A * clip(r, 1 - low, 1 + high)), and the tokens whose gradient the clip dropped."""
    plain = ratio if ratio_cap is None else jnp.minimum(ratio, ratio_cap)
    per_token = jnp.maximum(-advantages * plain, -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    if ratio_cap is not None:
        clipped = clipped | ((advantages < 0) & (ratio > ratio_cap))
    return per_token, clipped


def token_share(happened: Bool[Array, "B T"], mask: Float[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, count) of a boolean over the tokens that count, as a metric of a `Loss`."""
    mask = mask.astype(jnp.float32)
    return jnp.where(happened, mask, 0.0).sum(), mask.sum()
