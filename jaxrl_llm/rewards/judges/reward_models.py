"""The score of a reward model that the run trains, or has read from another one, as a reward."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import Positive, ranged


def step_value(process_scores: Float[Array, "B"]) -> Float[Array, "B"]:
    """How likely the network `process` finds that what was written so far leads to a right answer.

        r = sigmoid(score behind the last token)

    With weight 0 it pays nothing; `tree_search` reads it.

    Reference: ReST-MCTS* (2406.03816).
    Certainty: verified
    """
    return jax.nn.sigmoid(process_scores.astype(jnp.float32))


@ranged
def learned_reward(
    reward_scores: Float[Array, "B"], *, shift: float = 0.0, scale: Positive = 1.0, limit: Positive | None = None
) -> Float[Array, "B"]:
    """What the network `reward` says of a completion.

        r = clip((s - shift) / scale, -limit, limit)

    A reward model is right where its pairs were; far from there the policy finds what it overrates. Keep a divergence
    from the reference in the recipe, and a verifier of weight 0 in front where there is one: `correct` reports it.

    Args:
      reward_scores: one number per completion, of a stage before this one or of a checkpoint.
      shift, scale: mean and deviation of the scores on reference answers; a pair's scores have no zero of their own.
      limit: bound of the reward; None is none.

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
