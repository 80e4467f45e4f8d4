"""Loss coefficients set by feedback controllers: methods over the metrics of a batch.

A recipe writes a controller in the place of a number: `coefficient: {adaptive_kl: {...}}`. Its value multiplies the
loss of the same entry and carries no gradient.
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, NonNegative, Positive, ShareBelowOne, ranged

KLUnit = Literal["sequence", "token"]
ControlOutput = Literal["coefficient", "penalty"]


@ranged
def adaptive_kl(
    *,
    sequences_per_step: Count,
    init: Positive = 0.1,
    target: Positive = 6.0,
    horizon: Positive = 10000.0,
    error_limit: Positive = 0.2,
    unit: KLUnit = "sequence",
) -> Method:
    """A coefficient that grows while the KL to the reference is above a target, and shrinks while it is below.

        beta <- beta * (1 + clip(KL / target - 1, -error_limit, error_limit) * sequences_per_step / horizon)

    The measured batch is still scaled by the old value, so the first step has `init`. The usual target of 6 is in nats
    per sequence; with unit "token" the target is in nats per token and must be chosen accordingly.

    Args:
      sequences_per_step: sequences in the batch of a step.
      init: coefficient of the first step.
      target: intended KL(policy || reference), in nats per `unit`.
      horizon: sequences over which a lasting error of 10% changes the coefficient by about 10%.
      error_limit: bound of the relative error.
      unit: "sequence" multiplies the measured KL per token by the mean length of the completions.

    Returns:
      A method that remembers the coefficient; its update reads `kl_reference_per_token` and, for "sequence",
      `completion_tokens`.

    Raises:
      ValueError: for an unknown unit, or a number that is not positive.

    Reference: Ziegler et al., Fine-tuning from human preferences (1909.08593).
    Certainty: verified
    """
    if unit not in get_args(KLUnit):
        raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(get_args(KLUnit))}")
    first = init

    def start():
        return {"coefficient": jnp.float32(first)}

    def step(memory, kl):
        value = memory["coefficient"]
        error = _limited_error(kl.astype(jnp.float32), target, error_limit)
        return value, {"coefficient": value * (1 + error * sequences_per_step / horizon)}

    def update_sequence(memory, kl_reference_per_token: Float[Array, ""], completion_tokens: Float[Array, ""]):
        return step(memory, jnp.asarray(kl_reference_per_token) * completion_tokens)

    def update_token(memory, kl_reference_per_token: Float[Array, ""]):
        return step(memory, jnp.asarray(kl_reference_per_token))

    return Method(start, update_sequence if unit == "sequence" else update_token)


def _limited_error(kl: Array, target: float, limit: float) -> Array:
    """Relative error of a divergence from its target, clipped to +-limit."""
    return jnp.clip(kl / target - 1, -limit, limit)


@ranged
def adaptive_kl_of_rows(
    *,
    init: Positive = 0.1,
    target: Positive = 6.0,
    horizon: Positive = 10000.0,
    error_limit: Positive = 0.2,
) -> Method:
    """The coefficient of `adaptive_kl` for a divergence that is part of the rewards: an entry of credit.

        beta <- beta * (1 + clip(KL / target - 1, -error_limit, error_limit) * n / horizon)
        KL = mean over the n rows of sum_t (log pi_old - log pi_reference)

    The measured rows are still penalised with the old value.

    Args:
      init: coefficient of the first step.
      target: intended KL(policy || reference), in nats per sequence.
      horizon: sequences over which a lasting error of 10% changes the coefficient by about 10%.
      error_limit: bound of the relative error.

    Returns:
      A method that remembers the coefficient; its update reads `old_logprobs`, `reference_logprobs`, `mask` and
      `weight`, and returns the coefficient of each row, for the field `kl_coefficients` that `kl_penalized_rewards`
      reads. A step without rows leaves it as it is.

    Reference: Ziegler et al., Fine-tuning from human preferences (1909.08593).
    Certainty: verified
    """

    def update(
        memory,
        old_logprobs: Float[Array, "B T"],
        reference_logprobs: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
    ):
        chex.assert_equal_shape([old_logprobs, reference_logprobs, mask])
        gap = old_logprobs.astype(jnp.float32) - reference_logprobs.astype(jnp.float32)
        there = weight > 0
        rows = there.sum().astype(jnp.float32)
        kl = jnp.where((mask > 0) & there[:, None], gap, 0.0).sum() / jnp.maximum(rows, 1.0)
        value = memory["coefficient"]
        moved = value * (1 + _limited_error(kl, target, error_limit) * rows / horizon)
        return jnp.full(weight.shape, value), {"coefficient": moved}

    return Method(lambda: {"coefficient": jnp.float32(init)}, update)


@ranged
def entropy_gated_kl(
    *,
    output: ControlOutput = "coefficient",
    base_threshold: float = 0.3,
    lowest_threshold: NonNegative = 0.1,
    highest_threshold: NonNegative = 0.6,
    proportional: float = 0.3,
    integral: float = 0.01,
    derivative: float = 0.05,
    target_velocity: float = 0.001,
    kl_decay: ShareBelowOne = 0.9,
    reward_decay: ShareBelowOne = 0.95,
    strength: Positive = 0.1,
    window: Count = 50,
) -> Method:
    """A one-sided penalty on the KL above a threshold, which a PID controller sets from the trend of the reward.

    With k the moving average of the KL, e that of the mean reward, err = change of e - target_velocity and H the
    entropy:

        adjustment = proportional * err + integral * clip(sum of err, -1, 1) + derivative * (change of err)
        threshold = clip((base_threshold + adjustment) * phase, lowest_threshold, highest_threshold)
        penalty = strength * max(k - threshold, 0)^2 * max(0.5, 2 / (H + 0.1))

    A falling reward lowers the threshold; the penalty is larger at low entropy. phase is 1.5 during the first `window`
    - 1 steps; then, over the last `window` rewards, 1.2 where their mean is above the mean of the `window` rewards
    before by more than 0.01, else 1.0 where their population deviation is below 0.02 and their mean above 0.7, else
    0.8.

    The penalty is computed from metrics: added to a loss, as in the released code, it has no gradient. With output
    "coefficient" the value is the derivative of the penalty by the KL of this batch,

        2 * strength * max(k - threshold, 0) * max(0.5, 2 / (H + 0.1)) * (1 - kl_decay)

    and as the coefficient of a divergence loss it gives the gradient of the penalty.

    Args:
      output: "coefficient", or the "penalty" itself.
      base_threshold: threshold without adjustment, in nats per token.
      lowest_threshold: lower limit of the threshold.
      highest_threshold: upper limit.
      proportional, integral, derivative: gains of the controller, in nats per unit of reward.
      target_velocity: change of the averaged reward per step at which the error is 0.
      kl_decay: decay of the moving average of the KL, which starts at 0.
      reward_decay: decay of the moving average of the reward, which starts at the first reward.
      strength: factor of the penalty.
      window: rewards per window of the phase rule.

    Returns:
      A method that remembers averages, errors and the last 2 * window rewards; its update reads
      `kl_reference_per_token`, `entropy_per_token` and `reward`.

    Raises:
      ValueError: for an unknown output, a decay outside [0, 1), thresholds out of order, a window below 1 or a strength
        that is not positive.

    Reference: SAFE (2602.04651).
    Certainty: verified
    """
    if output not in get_args(ControlOutput):
        raise ValueError(f"output is {output!r}; it must be one of {', '.join(get_args(ControlOutput))}")
    if not 0 <= lowest_threshold <= highest_threshold:
        raise ValueError(
            f"lowest_threshold is {lowest_threshold} and highest_threshold is {highest_threshold}; they must satisfy "
            "0 <= lowest_threshold <= highest_threshold"
        )

    def init():
        # A separate array each: the step donates its state, and a buffer can be donated only once.
        return {
            "kl": jnp.float32(0),
            "reward": jnp.float32(0),
            "error": jnp.float32(0),
            "error_sum": jnp.float32(0),
            "calls": jnp.int32(0),
            "rewards": jnp.zeros(2 * window, jnp.float32),
        }

    def update(
        memory,
        kl_reference_per_token: Float[Array, ""],
        entropy_per_token: Float[Array, ""],
        reward: Float[Array, ""],
    ):
        kl, entropy, reward = (
            jnp.asarray(x).astype(jnp.float32) for x in (kl_reference_per_token, entropy_per_token, reward)
        )
        first = memory["calls"] == 0
        average_kl = kl_decay * memory["kl"] + (1 - kl_decay) * kl
        past = jnp.where(first, reward, memory["reward"])
        average = reward_decay * past + (1 - reward_decay) * reward
        error = jnp.where(first, 0.0, average - past - target_velocity)
        error_sum = jnp.clip(memory["error_sum"] + error, -1.0, 1.0)
        adjustment = proportional * error + integral * error_sum + derivative * (error - memory["error"])
        calls = memory["calls"] + 1
        rewards = jnp.concatenate([memory["rewards"][1:], reward[None]])
        phase = _phase(rewards[-window:], rewards[:window], calls, window)
        threshold = jnp.clip((base_threshold + adjustment) * phase, lowest_threshold, highest_threshold)
        excess = jnp.maximum(average_kl - threshold, 0.0)
        gate = jnp.maximum(0.5, 2 / (entropy + 0.1))
        if output == "penalty":
            value = strength * jnp.square(excess) * gate
        else:
            value = 2 * strength * excess * gate * (1 - kl_decay)
        memory = {
            "kl": average_kl,
            "reward": average,
            "error": error,
            "error_sum": error_sum,
            "calls": calls,
            "rewards": rewards,
        }
        return value, memory

    return Method(init, update)


def _phase(recent: Array, older: Array, calls: Array, window: int) -> Array:
    mean = recent.mean()
    rising = (calls >= 2 * window) & (mean > older.mean() + 0.01)
    settled = (recent.std() < 0.02) & (mean > 0.7)
    later = jnp.where(rising, 1.2, jnp.where(settled, 1.0, 0.8))
    return jnp.where(calls < window, 1.5, later)
