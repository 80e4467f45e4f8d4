"""Sampling temperature of extra answers, controlled by the entropy of the policy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import NonNegative, Positive, ranged
from jaxrl_llm.statistics import sampled_entropy


@ranged
def steering_temperature(
    entropy: Float[Array, ""] | float, *, target: NonNegative = 0.5, cold: Positive = 0.8, hot: Positive = 1.2
) -> Float[Array, ""]:
    """Sampling temperature of the extra answers: `hot` where the entropy is at most the target, else `cold`.

    >>> [round(float(steering_temperature(h)), 1) for h in (0.3, 0.7)]
    [1.2, 0.8]

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    if not 0 < cold < hot:
        raise ValueError(f"cold is {cold} and hot is {hot}; they are temperatures and must satisfy 0 < cold < hot")
    return jnp.where(jnp.asarray(entropy) <= target, hot, cold).astype(jnp.float32)


@ranged
def temperature_controller(*, target: NonNegative = 0.5, cold: Positive = 0.8, hot: Positive = 1.2) -> Method:
    """AEPO's temperature for the extra answers of the next step, from the entropy of this step.

    Before the first step the entropy counts as 0, so the first temperature is `steering_temperature(0)`.

    Args:
      target: intended entropy, in nats per token (0.25 to 0.75 in the paper).
      cold: temperature that lowers the entropy.
      hot: temperature that raises it.

    Returns:
      A method that remembers the entropy; its update gives the temperature of the next rollout.

    Raises:
      ValueError: for temperatures that are not positive or not in order.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """
    steering_temperature(0.0, target=target, cold=cold, hot=hot)

    def init():
        return {"entropy": jnp.float32(0.0)}

    def update(memory, old_logprobs: Float[Array, "B T"], mask: Float[Array, "B T"], weight: Float[Array, "B"]):
        del memory  # an empty batch has entropy 0
        entropy = sampled_entropy(old_logprobs, mask, weight)
        return steering_temperature(entropy, target=target, cold=cold, hot=hot), {"entropy": entropy}

    return Method(init, update)
