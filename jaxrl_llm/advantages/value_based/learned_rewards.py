"""Rewards of tokens and ends for reinforcement against a reward model."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages.value_based.gae import outcome_token_rewards
from jaxrl_llm.ranges import NonNegative, Positive, ranged

MissingEnd = Literal["replace", "subtract"]


@ranged
def implicit_token_rewards(
    rewards: Float[Array, "B"],
    guide_logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    beta: NonNegative = 0.05,
    limit: Positive = 0.05,
    kl_coefficient: NonNegative = 0.01,
    reward_limit: Positive = 10.0,
) -> Float[Array, "B T"]:
    """RTO: token rewards from a model trained by DPO, plus the sequence's reward on the last token.

        r_t = clip(beta * (log pi_guide - log pi_reference), -limit, limit)
              - kl_coefficient * (log pi_old - log pi_reference)
              + [t is last] * clip(reward, -reward_limit, reward_limit)

    Without `limit` the first terms sum to the implicit reward of the guide.

    Args:
      rewards: of each row, of a reward model.
      guide_logprobs: under a model trained by a preference loss from the reference (a network `guide`).
      old_logprobs: under the policy that sampled.
      reference_logprobs: under the reference.
      mask: non-zero on tokens that count.
      beta: units of reward per nat.
      limit: bound of a token's dense reward.
      kl_coefficient: units of reward per nat.
      reward_limit: bound of the sequence's reward.

    Returns:
      One reward per token, for `token_rewards`; 0 outside the mask.

    Reference: RTO (2404.18922).
    Certainty: verified
    """
    chex.assert_rank([guide_logprobs, old_logprobs, reference_logprobs, mask], 2)
    chex.assert_equal_shape([guide_logprobs, old_logprobs, reference_logprobs, mask])
    reference = reference_logprobs.astype(jnp.float32)
    dense = jnp.clip(beta * (guide_logprobs - reference), -limit, limit) - kl_coefficient * (old_logprobs - reference)
    end = outcome_token_rewards(jnp.clip(rewards.astype(jnp.float32), -reward_limit, reward_limit), mask)
    return jnp.where(mask > 0, dense + end, 0.0)


@ranged
def missing_end_penalty(
    rewards: Float[Array, "B"],
    truncated: Bool[Array, "B"],
    *,
    penalty: NonNegative = 10.0,
    form: MissingEnd = "replace",
) -> Float[Array, "B"]:
    """Rewards with a penalty for completions without end of sequence, on which reward models are not trained.

        replace   r, or -penalty where the completion reached its length limit
        subtract  r, or r - penalty there

    Args:
      rewards: score of each row.
      truncated: the completion reached its length limit before end of sequence.
      penalty: in units of reward.
      form: as above.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for an unknown form, or a negative penalty.

    Reference: Unpacking DPO and PPO (2406.09279).
    Certainty: verified
    """
    chex.assert_equal_shape([rewards, truncated])
    if form not in get_args(MissingEnd):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(MissingEnd))}")
    r = rewards.astype(jnp.float32)
    return jnp.where(truncated.astype(bool), -penalty if form == "replace" else r - penalty, r)
