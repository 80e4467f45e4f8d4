"""Token-level credit: rewards of tokens, discounted returns, and generalised advantage estimation.

Tokens outside the mask (prompts, tool output, padding) take no part: discounting, bootstrapping and sums carry over
them as if they were not there, so a reward at the end of a conversation reaches its first turn.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages.reinforce.whitening import whitened
from jaxrl_llm.ranges import NonNegative, Share, ranged


def outcome_token_rewards(rewards: Float[Array, "B"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The reward of each row on its last token that counts, 0 elsewhere.

    >>> outcome_token_rewards(jnp.array([1.0, 2.0]), jnp.array([[1, 1, 0], [1, 1, 1]])).tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]
    """
    chex.assert_rank([rewards, mask], [1, 2])
    counted = mask > 0
    remaining = jnp.cumsum(counted[:, ::-1], axis=-1)[:, ::-1]
    return jnp.where(counted & (remaining == 1), rewards.astype(jnp.float32)[:, None], 0.0)


@ranged
def kl_penalized_rewards(
    rewards: Float[Array, "B"],
    old_logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    token_rewards: Float[Array, "B T"] | None = None,
    kl_coefficients: Float[Array, "B"] | None = None,
    *,
    kl_coefficient: NonNegative = 0.05,
) -> Float[Array, "B T"]:
    """Token rewards minus a divergence from the reference: the reward of classic RLHF.

        rho_t = token_reward_t - kl_coefficient * (log pi_old_t - log pi_reference_t)

    Args:
      rewards: total reward of each row, given on its last token where there are no `token_rewards`.
      old_logprobs: log-probability of each token under the policy that the update starts from.
      reference_logprobs: under the reference policy.
      mask: non-zero on tokens that count.
      token_rewards: reward of each token; they take the place of `rewards`.
      kl_coefficients: coefficient of each row, in place of `kl_coefficient` (filled by `adaptive_kl_of_rows`).
      kl_coefficient: units of reward per nat.

    Returns:
      One reward per token, 0 outside the mask.

    Reference: Ziegler et al., Fine-tuning from human preferences (1909.08593).
    Certainty: verified
    """
    chex.assert_rank([old_logprobs, reference_logprobs, mask], 2)
    chex.assert_equal_shape([old_logprobs, reference_logprobs, mask])
    base = outcome_token_rewards(rewards, mask) if token_rewards is None else token_rewards.astype(jnp.float32)
    factor = kl_coefficient if kl_coefficients is None else kl_coefficients.astype(jnp.float32)[:, None]
    penalty = factor * (old_logprobs.astype(jnp.float32) - reference_logprobs.astype(jnp.float32))
    return jnp.where(mask > 0, base - penalty, 0.0)


@ranged
def generalized_advantages(
    token_rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    gamma: Share = 1.0,
    lam: Share = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and lambda-returns of given token rewards and values.

        delta_t = rho_t + gamma * V_{t+1} - V_t
        A_t = delta_t + gamma * lam * A_{t+1}
        R_t = A_t + V_t

    with t + 1 the next token that counts, and V = A = 0 after the last one.

    Args:
      token_rewards: rho, the reward of each token.
      values: V, value of the state before each token.
      mask: non-zero on tokens that count.
      gamma: discount per token.
      lam: weight of longer returns; 1 is the whole return minus the value, 0 the one-step error.

    Returns:
      (advantages, returns), both 0 outside the mask.

    Raises:
      ValueError: for gamma or lam outside [0, 1].

    Reference: GAE (1506.02438).
    Certainty: verified
    """
    chex.assert_rank([token_rewards, values, mask], 2)
    chex.assert_equal_shape([token_rewards, values, mask])
    counted = mask > 0
    token_rewards, values = (jnp.where(counted, x.astype(jnp.float32), 0.0) for x in (token_rewards, values))

    def backwards(after, now):
        next_value, next_advantage = after
        reward, value, counts = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        return (jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage)), advantage

    nothing = jnp.zeros_like(values[:, 0])
    columns = (token_rewards.T, values.T, counted.T)
    _, advantages = jax.lax.scan(backwards, (nothing, nothing), columns, reverse=True)
    advantages = jnp.where(counted, advantages.T, 0.0)
    return advantages, jnp.where(counted, advantages + values, 0.0)


@ranged
def gae(
    rewards: Float[Array, "B"],
    old_values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    token_rewards: Float[Array, "B T"] | None = None,
    *,
    gamma: Share = 1.0,
    lam: Share = 0.95,
) -> Float[Array, "B T"]:
    """Generalised advantage estimates of PPO, before whitening (see `generalized_advantages`).

    Args:
      rewards: total reward of each row, given on its last token where there are no `token_rewards`.
      old_values: value model at each token, before the update.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      token_rewards: reward of each token; they take the place of `rewards`.
      gamma: discount per token.
      lam: weight of longer returns.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for gamma or lam outside [0, 1].

    Reference: GAE (1506.02438); PPO (1707.06347).
    Certainty: verified
    """
    counted = _counted(mask, weight)
    rewarded = outcome_token_rewards(rewards, mask) if token_rewards is None else token_rewards
    return generalized_advantages(rewarded, old_values, counted, gamma=gamma, lam=lam)[0]


@ranged
def gae_returns(
    rewards: Float[Array, "B"],
    old_values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    token_rewards: Float[Array, "B T"] | None = None,
    *,
    gamma: Share = 1.0,
    lam: Share = 0.95,
) -> Float[Array, "B T"]:
    """Lambda-returns, the targets of the value model; parameters and errors as for `gae`.

    Returns:
      One target per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for gamma or lam outside [0, 1].

    Reference: GAE (1506.02438).
    Certainty: verified
    """
    counted = _counted(mask, weight)
    rewarded = outcome_token_rewards(rewards, mask) if token_rewards is None else token_rewards
    return generalized_advantages(rewarded, old_values, counted, gamma=gamma, lam=lam)[1]


@ranged
def discounted_returns(
    rewards: Float[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    token_rewards: Float[Array, "B T"] | None = None,
    *,
    gamma: Share = 1.0,
) -> Float[Array, "B T"]:
    """Discounted sum of the rewards from each token on.

        G_t = rho_t + gamma * G_{t+1}

    Args:
      rewards: total reward of each row, given on its last token where there are no `token_rewards`.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      token_rewards: reward of each token; they take the place of `rewards`.
      gamma: discount per token.

    Returns:
      One return per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for gamma outside [0, 1].

    Reference: Williams, REINFORCE (1992).
    Certainty: verified
    """
    counted = _counted(mask, weight)
    rewarded = outcome_token_rewards(rewards, mask) if token_rewards is None else token_rewards
    return generalized_advantages(rewarded, jnp.zeros_like(counted), counted, gamma=gamma, lam=1.0)[0]


@ranged
def reinforce_plus_plus(
    rewards: Float[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    token_rewards: Float[Array, "B T"] | None = None,
    *,
    gamma: Share = 1.0,
    eps: NonNegative = 1e-8,
) -> Float[Array, "B T"]:
    """Discounted returns, whitened over the tokens of the batch: REINFORCE++.

    The baseline is the batch mean, so groups of equal rewards still have non-zero advantages.

    Args:
      rewards: total reward of each row, given on its last token where there are no `token_rewards`.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      token_rewards: reward of each token, such as `kl_penalized_rewards`; they take the place of `rewards`.
      gamma: discount per token.
      eps: added to the variance.

    Returns:
      One advantage per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for gamma outside [0, 1].

    Reference: REINFORCE++ (2501.03262).
    Certainty: verified
    """
    return whitened(discounted_returns(rewards, mask, weight, token_rewards, gamma=gamma), mask, weight, eps=eps)


def _counted(mask, weight):
    chex.assert_rank([mask, weight], [2, 1])
    return jnp.where((mask > 0) & (weight > 0)[:, None], 1.0, 0.0)
