"""Adaptive weights of several objectives."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged


@ranged
def influence_weights(
    weights: Float[Array, "K"],
    gradients: Float[Array, "K D"],
    *,
    learning_rate: NonNegative = 1e-6,
    mu: Positive = 1e-5,
) -> Float[Array, "K"]:
    """Weights of rewards after one multiplicative update by the influence of each reward on all of them.

        s_i = sum_j <g_i, g_j>,   w <- softmax(log w + learning_rate * s / mu)

    Args:
      weights: w before the update, positive, with sum 1.
      gradients: g, policy gradient of each single reward on one batch; the gradient of a subset of layers suffices.
      learning_rate: of the policy at this step.
      mu: strength of the regularisation towards the old weights.

    Returns:
      The new weights [K]; a reward that is constant over the batch has gradient 0 and influence 0.

    Reference: Dynamic reward weighting (2509.11452).
    Certainty: verified
    """
    chex.assert_rank([weights, gradients], [1, 2])
    influence = gradients.astype(jnp.float32) @ gradients.astype(jnp.float32).sum(0)
    return _moved(weights, influence, learning_rate, mu)


@ranged
def influence_weighted(
    *,
    reward_names: tuple[str, ...],
    initial: Sequence[float] | None = None,
    learning_rate: NonNegative = 1e-6,
    mu: Positive = 1e-5,
    every_steps: Count = 1,
) -> Method:
    """A weighted sum of rewards whose weights follow the influence of each reward on the policy gradient of all.

        r = sum_k w_k r_k,   w <- softmax(log w + learning_rate * mean s / mu),   s_k = <g_k, sum_j g_j>

    g_k is the policy gradient of reward k alone, with its own group-normalised advantages, over all trained parameters.
    A step takes K + 1 further backward passes. The weight of a reward rises relative to the others if its gradient is
    long and agrees with theirs; that of a reward which is equal within each group falls.

    Args:
      reward_names: names of the columns in their order; filled from the run.
      initial: w before the first update, positive; None is 1 / K for each. They are scaled to sum 1.
      learning_rate: of the policy, in the formula only. Its ratio to mu decides: s is a squared norm of gradients and
        depends on the size of the model, so look at the logged weights before trusting a value.
      mu: strength of the regularisation towards the old weights.
      every_steps: steps between two updates; s is averaged over them, and the new weights apply in the last of them.

    Returns:
      A method: (reward_components, reward_influence, step) -> a dictionary with `rewards` [B], and
      `metric/weight_NAME`, the weight of each reward function. A reward that does not apply (NaN) is left out of a
      row's sum; a row without any is NaN.

    Raises:
      ValueError: for an `initial` of another length than `reward_names`, or with a weight that is not positive.

    Reference: Dynamic reward weighting (2509.11452), which takes the gradients of the middle third of the layers.
    Certainty: verified
    """
    count = len(reward_names)

    def init() -> dict[str, Array]:
        first = [1.0] * count if initial is None else [float(one) for one in initial]
        if len(first) != count:
            raise ValueError(f"initial has {len(first)} weights; give one for each of the {count} rewards")
        if min(first) <= 0:
            raise ValueError(f"initial is {first}; weights must be above 0, since they are changed by factors")
        weights = jnp.asarray(first, jnp.float32)
        return {"weights": weights / weights.sum(), "influence": jnp.zeros(count)}

    def update(
        memory: dict[str, Array],
        reward_components: Float[Array, "B K"],
        reward_influence: Float[Array, "K"],
        step: Int[Array, ""],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        chex.assert_shape(reward_components, (None, count))
        chex.assert_shape(reward_influence, (count,))
        known = ~jnp.isnan(reward_components)
        total = memory["influence"] + jnp.nan_to_num(reward_influence.astype(jnp.float32))
        due = (step + 1) % every_steps == 0
        moved = _moved(memory["weights"], total / every_steps, learning_rate, mu)
        weights = jnp.where(due, moved, memory["weights"])
        summed = jnp.where(known, reward_components.astype(jnp.float32), 0.0) @ weights
        told = {f"metric/weight_{name}": weights[place] for place, name in enumerate(reward_names)}
        value = {"rewards": jnp.where(known.any(1), summed, jnp.nan), **told}
        return value, {"weights": weights, "influence": jnp.where(due, 0.0, total)}

    return Method(init, update)


def _moved(weights: Float[Array, "K"], influence: Float[Array, "K"], learning_rate: float, mu: float) -> Array:
    return jax.nn.softmax(jnp.log(weights.astype(jnp.float32)) + learning_rate * influence / mu)
