"""The score of a reward model, trained in the run or loaded, as a reward."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import Positive, Share, ranged
from jaxrl_llm.statistics import gaussian_heads


def step_value(process_scores: Float[Array, "B"]) -> Float[Array, "B"]:
    """Probability of a right answer under the process reward model `process`.

        r = sigmoid(score after the last token)

    Use it with weight 0 as input of `tree_search`.

    Args:
      process_scores: score after the last token of each row.

    Returns:
      One reward per row in (0, 1), float32.

    Reference: ReST-MCTS* (2406.03816).
    Certainty: verified
    """
    return jax.nn.sigmoid(process_scores.astype(jnp.float32))


@ranged
def learned_reward(
    reward_scores: Float[Array, "B"], *, shift: float = 0.0, scale: Positive = 1.0, limit: Positive | None = None
) -> Float[Array, "B"]:
    """The normalised score of the network `reward`.

        r = clip((s - shift) / scale, -limit, limit)

    A reward model is accurate only near its training pairs; elsewhere the policy exploits its errors. Keep a divergence
    from the reference in the recipe, and, where available, a verifier of weight 0 as first reward for the metric
    `correct`.

    Args:
      reward_scores: one number per completion, of a network from an earlier stage or a checkpoint.
      shift, scale: mean and deviation of the scores on reference answers, since preference pairs do not fix the zero of
        scores.
      limit: bound of |r|; None is no bound.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for a scale or limit that is not positive.

    Reference: InstructGPT (2203.02155).
    Certainty: recalled
    """
    chex.assert_rank(reward_scores, 1)
    reward = (reward_scores.astype(jnp.float32) - shift) / scale
    return reward if limit is None else jnp.clip(reward, -limit, limit)


@ranged
def robust_score(reward_scores: Float[Array, "B 2K"], *, alpha: Share = 0.3) -> Float[Array, "B"]:
    """Convex combination of the mean of the head with the least deviation and the lowest mean of all heads.

        r = alpha * m_s + (1 - alpha) * min_k m_k,   s = argmin_k deviation_k

    Args:
      reward_scores: of K Gaussian heads (`losses.gaussian_bradley_terry`): K means m, then K logarithms of deviations.
      alpha: weight of the head with the least deviation; 0 is the worst case. Ties: the first head.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for an odd number of outputs.

    Reference: Reward-robust RLHF (2409.15360).
    Certainty: reconstructed
    """
    mean, deviation = gaussian_heads(reward_scores)
    nominal = jnp.take_along_axis(mean, jnp.argmin(deviation, axis=1)[:, None], axis=1)[:, 0]
    return alpha * nominal + (1 - alpha) * mean.min(axis=1)
