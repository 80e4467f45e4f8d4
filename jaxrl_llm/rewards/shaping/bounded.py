"""Normalised and bounded rewards: by reference answers, percentiles, the batch, or running moments."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import NonNegative, Positive, ranged
from jaxrl_llm.statistics import moments

BoundedForm = Literal["sigmoid", "centered", "tanh", "arctan", "shifted", "polynomial", "log_sigmoid"]
# Quantile of Normal(0, 1) at 0.85.
_QUANTILE = 1.0364334


@ranged
def reference_bounded(
    rewards: Float[Array, "B"],
    reference_rewards: Float[Array, "B M"] | None = None,
    *,
    form: BoundedForm = "sigmoid",
    slope: Positive = 1.0,
) -> Float[Array, "B"]:
    """Bounded reward differences to reference answers, which limits over-optimisation of a proxy.

        d_m = r - ref_m

    and, by form,

        sigmoid       mean_m sigmoid(slope * d_m)
        shifted       mean_m sigmoid(slope * (d_m - 3))
        polynomial    mean_m g(d_m), g the quintic nearest to the sigmoid on [-5, 5], 0 below and 1 above
        tanh          mean_m tanh(d_m)
        arctan        mean_m atan(d_m)
        centered      mean_m d_m
        log_sigmoid   log sigmoid(r - q), q = mean_m ref_m + 1.0364334 * (std_m ref_m + 1e-5)

    Args:
      rewards: of a proxy, such as a reward model; NaN does not apply.
      reference_rewards: proxy rewards of M answers of the start policy to the same prompt, or of one; a column of the
        data, or another name (`reads`). NaN is a missing answer. None is one reference of reward 0 (uncentred).
      form: as above; 'sigmoid' is preference as reward.
      slope: slope of the sigmoids.

    Returns:
      One reward per row, float32; NaN for rows without a reward or a reference.

    Raises:
      ValueError: for an unknown form.

    Reference: PAR (2502.18770).
    Certainty: verified
    """
    chex.assert_rank(rewards, 1)
    if form not in get_args(BoundedForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(BoundedForm))}")
    r = rewards.astype(jnp.float32)
    given = jnp.zeros_like(r) if reference_rewards is None else jnp.asarray(reference_rewards, jnp.float32)
    given = given.reshape(len(r), -1)
    known = ~jnp.isnan(given)
    count, reference = known.sum(axis=1), jnp.where(known, given, 0.0)
    if form == "log_sigmoid":
        mean = reference.sum(axis=1) / jnp.maximum(count, 1)
        squares = jnp.where(known, jnp.square(given - mean[:, None]), 0.0).sum(axis=1)
        deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
        bounded = jax.nn.log_sigmoid(r - mean - _QUANTILE * (deviation + 1e-5))
    else:
        each = _BOUNDED[form](r[:, None] - reference, slope)
        bounded = jnp.where(known, each, 0.0).sum(axis=1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, bounded, jnp.nan)


_BOUNDED: dict[str, Any] = {
    "sigmoid": lambda d, slope: jax.nn.sigmoid(slope * d),
    "shifted": lambda d, slope: jax.nn.sigmoid(slope * (d - 3)),
    "polynomial": lambda d, slope: jnp.where(
        d < -5, 0.0, jnp.where(d > 5, 1.0, jnp.polyval(jnp.asarray(_quintic(), jnp.float32), d))
    ),
    "tanh": lambda d, slope: jnp.tanh(d),
    "arctan": lambda d, slope: jnp.arctan(d),
    "centered": lambda d, slope: d,
}


@cache
def _quintic() -> tuple[float, ...]:
    x = np.linspace(-5, 5, 100)
    return tuple(np.polyfit(x, 1 / (1 + np.exp(-x)), 5).tolist())


@ranged
def percentile_bounded(
    rewards: Float[Array, "B"],
    low: Float[Array, "B"],
    middle: Float[Array, "B"],
    high: Float[Array, "B"],
    *,
    slope: Positive = 3.0,
) -> Float[Array, "B"]:
    """Scores of several data sets and tasks on one scale, relative to percentiles of the start policy.

        r = sigmoid(slope * (x - middle) / max(high - low, 1e-6)), the exponent clipped to +-50

    Args:
      rewards: x, the score of each row; NaN does not apply.
      low, middle, high: quartiles of the start policy's scores on the row's data set and task (`item_numbers`).
      slope: 3 in the paper.

    Returns:
      One reward per row in [0, 1], float32; NaN where a score or a percentile is NaN.

    Reference: MedGRPO (2512.06581).
    Certainty: reconstructed
    """
    chex.assert_equal_shape([rewards, low, middle, high])
    spread = (high - low).astype(jnp.float32)
    z = slope * (rewards.astype(jnp.float32) - middle.astype(jnp.float32)) / jnp.maximum(spread, 1e-6)
    return jax.nn.sigmoid(jnp.clip(z, -50.0, 50.0))


@ranged
def whitened_rewards(
    rewards: Float[Array, "B"],
    weight: Float[Array, "B"],
    *,
    center: bool = True,
    keep_mean: bool = False,
    eps: NonNegative = 1e-8,
) -> Float[Array, "B"]:
    """Rewards with variance 1 over the batch.

        (r - mean) / sqrt(variance + eps)

    with the unbiased variance. `center: false` only rescales; `keep_mean: true` adds the mean again, as TRL and verl do
    with rewards.

    Args:
      rewards: rewards before; NaN does not apply and takes part in no statistic.
      weight: 0 for absent rows.
      center: whether the mean is removed.
      keep_mean: whether the mean is added back.
      eps: added to the variance.

    Returns:
      One reward per row, float32, 0 in absent rows.

    Raises:
      ValueError: for keep_mean without center.

    Reference: PPO for language models, as TRL and verl whiten rewards (1909.08593).
    Certainty: verified
    """
    chex.assert_rank([rewards, weight], 1)
    if keep_mean and not center:
        raise ValueError("keep_mean is true, but center is false, which removes no mean; leave one of them out")
    r = rewards.astype(jnp.float32)
    mean, variance = moments(r, jnp.where(jnp.isnan(r), 0.0, weight.astype(jnp.float32)))
    scaled = (r - mean if center else r) / jnp.sqrt(variance + eps) + (mean if keep_mean else 0.0)
    return jnp.where(weight > 0, scaled, 0.0)


@ranged
def clipped_rewards(rewards: Float[Array, "B"], *, least: float = -10.0, most: float = 10.0) -> Float[Array, "B"]:
    """Rewards within bounds.

        clip(r, least, most)

    Args:
      rewards: rewards before; NaN does not apply and stays.
      least, most: the bounds.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for least > most.
    """
    if least > most:
        raise ValueError(f"least is {least}; it must be at most most, which is {most}")
    return jnp.clip(rewards.astype(jnp.float32), least, most)


@ranged
def running_normalized(*, center: bool = True, limit: Positive | None = None) -> Method:
    """Rewards normalised by the running mean and deviation of all rewards so far, this batch included.

        d = mean_batch - mean,   N = n + n_batch
        M2 <- M2 + n_batch * variance + d^2 * n * n_batch / N
        mean <- mean + d * n_batch / N
        r' = (r - mean) / sqrt(M2 / N)

    which makes the update invariant to the scale of rewards. Where all rewards so far are equal, the divisor is 1.

    Args:
      center: whether the mean is removed; false only rescales.
      limit: bound of |r'|, 5 to 10; None is no bound.

    Returns:
      A method that names `rewards` and `weight`: one reward per row, float32, 0 in absent rows. NaN stays NaN and is
      left out of the moments.

    Reference: PPO implementations with running moments (1707.06347).
    Certainty: verified
    """

    def init() -> dict[str, Array]:
        return {name: jnp.zeros((), jnp.float32) for name in ("count", "mean", "squares")}

    def update(
        memory: dict[str, Array], rewards: Float[Array, "B"], weight: Float[Array, "B"]
    ) -> tuple[Float[Array, "B"], dict[str, Array]]:
        r = rewards.astype(jnp.float32)
        there = jnp.where(jnp.isnan(r) | (weight <= 0), 0.0, 1.0)
        batch_mean, variance = moments(r, there, ddof=0)
        count, n = memory["count"], there.sum()
        total = jnp.maximum(count + n, 1.0)
        difference = jnp.where(n > 0, batch_mean - memory["mean"], 0.0)
        mean = memory["mean"] + difference * n / total
        squares = memory["squares"] + n * variance + jnp.square(difference) * count * n / total
        deviation = jnp.sqrt(squares / total)
        scaled = (r - mean if center else r) / jnp.where(deviation > 0, deviation, 1.0)
        scaled = scaled if limit is None else jnp.clip(scaled, -limit, limit)
        return jnp.where(weight > 0, scaled, 0.0), {"count": count + n, "mean": mean, "squares": squares}

    return Method(init, update)
