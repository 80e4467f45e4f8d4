"""Values from heads with several outputs, and advantages from several critics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages.value_based.gae import generalized_advantages, outcome_token_rewards
from jaxrl_llm.ranges import NonNegative, Positive, PositiveShare, Share, ranged
from jaxrl_llm.statistics import moments, token_weights

Bins = Literal["gaussian", "two_hot"]
Pessimism = Literal["least", "deviations"]


@ranged
def quantile_mean(old_values: Float[Array, "B T N"], *, lower_share: PositiveShare = 1.0) -> Float[Array, "B T"]:
    """The mean of a value head's quantiles, or of the lowest of them: a risk-averse value.

        V = mean of the lowest lower_share * N outputs, the last of them in part

    `critic_mean: quantile_mean` and `reads: {old_values: critic_mean}` pass it to `gae` and `gae_returns`.

    Args:
      old_values: quantiles that `quantile_value` trains, in any order.
      lower_share: 1 is the mean, less is the conditional value at risk of that share.

    Returns:
      One value per token, float32.

    Reference: distributional dynamic programming (2501.13028), quantile regression (1710.10044).
    Certainty: recalled
    """
    chex.assert_rank(old_values, 3)
    count = lower_share * old_values.shape[-1]
    share = jnp.clip(count - jnp.arange(old_values.shape[-1]), 0.0, 1.0)
    return (jnp.sort(old_values.astype(jnp.float32), axis=-1) * share).sum(axis=-1) / count


@ranged
def critic_quantile(old_values: Float[Array, "B T K"], *, level: Share = 0.25) -> Float[Array, "B T"]:
    """A low quantile of several critics' values of a token: a pessimistic estimate.

    Between two critics it is interpolated linearly. `value_floor: critic_quantile` and `reads: {old_values:
    value_floor}` pass it to `gae` and `gae_returns`.

    Args:
      old_values: of critics that `several_values` trains, with different initial heads.
      level: 0 is the lowest of them, 0.5 the median.

    Returns:
      One value per token, float32.

    Reference: RIQL (2310.12955).
    Certainty: verified
    """
    chex.assert_rank(old_values, 3)
    return jnp.quantile(old_values.astype(jnp.float32), level, axis=-1)


@ranged
def bin_mean(old_values: Float[Array, "B T N"], *, low: float, high: float, form: Bins = "gaussian") -> Array:
    """The expected value of a categorical distribution over bins.

        V = sum_k s_k * centre_k,   s = softmax(v)

    Args:
      old_values: logits that `categorical_value` trains.
      low, high, form: as in `categorical_value`.

    Returns:
      One value per token, float32.

    Raises:
      ValueError: for an unknown form.

    Reference: HL-Gauss, Stop regressing (2403.03950).
    Certainty: recalled
    """
    chex.assert_rank(old_values, 3)
    if form not in get_args(Bins):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Bins))}")
    count = old_values.shape[-1]
    inset = 0.0 if form == "two_hot" else (high - low) / (2 * count)
    centres = jnp.linspace(low + inset, high - inset, count)
    return (jax.nn.softmax(old_values.astype(jnp.float32), axis=-1) * centres).sum(axis=-1)


@ranged
def critic_per_reward(
    reward_components: Float[Array, "B K"],
    old_values: Float[Array, "B T C"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    *,
    weights: Mapping[str, float],
    reward_names: tuple[str, ...],
    gamma: Share = 1.0,
    lam: Share = 0.95,
    limit: Positive = 10.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T C"]]:
    """Advantages of several rewards, each with a critic of its own, on one scale before they are added up.

        A = sum_c w_c * clip(z(A_c), -limit, limit)

    with A_c the generalised advantages of reward c and z(x) = (x - mean) / std over the tokens of the batch.
    Multiplying a reward by a positive number changes nothing. `"[advantages, channel_returns]": {critic_per_reward:
    {weights: ...}}` fills both; `several_values` learns from the second.

    Args:
      reward_components: one column per reward function, before weights; NaN counts as 0.
      old_values: one value per critic, in the order of `weights`.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      weights: w of each reward, by its name.
      reward_names: filled from the run.
      gamma, lam: as of `gae`.
      limit: bound of |z(A_c)|, needed for rewards that are almost always 0.

    Returns:
      (advantages, returns of each critic), 0 outside the mask and in absent rows.

    Raises:
      ValueError: for a name that no reward has, or another number of critics than of weights.

    Reference: SLIM (2402.00823).
    Certainty: reconstructed
    """
    chex.assert_rank([reward_components, old_values, mask, weight], [2, 3, 2, 1])
    missing = [name for name in weights if name not in reward_names]
    if missing:
        raise ValueError(f"weights names {missing[0]!r}; the rewards are {', '.join(reward_names)}")
    if len(weights) != old_values.shape[-1]:
        raise ValueError(
            f"weights has {len(weights)} rewards, but the value network {old_values.shape[-1]} outputs; set "
            f"networks.value.head to {{outputs: {len(weights)}}}"
        )
    counted = token_weights(mask, weight)
    columns = jnp.stack([reward_components[:, reward_names.index(name)] for name in weights], axis=-1)

    def of_one(reward, values):
        placed = outcome_token_rewards(jnp.nan_to_num(reward), counted)
        advantages, returns = generalized_advantages(placed, values, counted, gamma=gamma, lam=lam)
        mean, variance = moments(advantages, counted, ddof=0)
        z = (advantages - mean) / jnp.maximum(jnp.sqrt(variance), 1e-8)
        return jnp.where(counted > 0, jnp.clip(z, -limit, limit), 0.0), returns

    each, returns = jax.vmap(of_one, in_axes=(1, 2), out_axes=2)(columns, old_values)
    return (each * jnp.asarray(list(weights.values()), jnp.float32)).sum(axis=-1), returns


@ranged
def reach_aware(
    rewards: Float[Array, "B"],
    old_values: Float[Array, "B T K"],
    value_scores: Float[Array, "B K"],
    truncated: Bool[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    token_rewards: Float[Array, "B T"] | None = None,
    *,
    form: Pessimism = "least",
    kappa: NonNegative = 1.0,
    gamma: Share = 1.0,
    lam: Share = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, ""]]:
    """Generalised advantages that bootstrap truncated completions from a pessimistic value of several critics.

        least        V = min_k V_k
        deviations   V = mean_k V_k - kappa * std_k V_k
        A_t = rho_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}

    with V = 0 after the last token of a completion that ended, and the critics' V after that of a truncated one. Such
    states are bootstrapped from but never trained on, so one critic's error there enters all targets. `"[advantages,
    value_targets, metric/cut_spread]": reach_aware` fills all; `several_values` trains the critics.

    Args:
      rewards: total reward of each row, given on its last token where there are no `token_rewards`.
      old_values: the critics at each token, before the update.
      value_scores: the critics after the last token.
      truncated: the completion reached its length limit.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      token_rewards: reward of each token; they take the place of `rewards`.
      form: of pessimism. With one critic it is GAE that bootstraps at truncation.
      kappa: how many deviations.
      gamma, lam: as of `gae`.

    Returns:
      (advantages, returns, mean deviation of the critics after truncated completions, 0 without any).

    Raises:
      ValueError: for an unknown form.

    Reference: Edge-of-Reach, RAVL (2402.12527).
    Certainty: reconstructed
    """
    chex.assert_rank([rewards, old_values, value_scores, truncated, mask, weight], [1, 3, 2, 1, 2, 1])
    if form not in get_args(Pessimism):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Pessimism))}")
    counted = token_weights(mask, weight)

    def pessimistic(values):
        values = values.astype(jnp.float32)
        return values.min(axis=-1) if form == "least" else values.mean(axis=-1) - kappa * values.std(axis=-1)

    cut = truncated.astype(bool) & (weight > 0)
    behind = outcome_token_rewards(jnp.where(cut, pessimistic(value_scores), 0.0), counted)
    placed = outcome_token_rewards(rewards, counted) if token_rewards is None else token_rewards
    advantages, returns = generalized_advantages(
        placed + gamma * behind, pessimistic(old_values), counted, gamma=gamma, lam=lam
    )
    spread = jnp.where(cut, value_scores.astype(jnp.float32).std(axis=-1), 0.0)
    return advantages, returns, spread.sum() / jnp.maximum(cut.sum(), 1)
