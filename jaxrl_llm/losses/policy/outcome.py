"""Learning from outcomes: clone right answers, push back wrong ones, weigh tokens by a token reward model.

The objective of OREAL is `success_cloning` + 0.5 * `failure_pushback` + 0.01 * `kl_estimate`, each averaged over its
own tokens, with `outcome_token_weight` as `token_weight` and `one_success_one_failure` as the selection of rows. (The
released code omits the divergence on right answers but divides it by the number of all tokens.)
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.policy.surrogates import policy_gradient
from jaxrl_llm.losses.ratio import constant_factor, on_mask
from jaxrl_llm.ranges import Count, PositiveShare, ShareBelowOne, ranged


@ranged
def success_cloning(
    logprobs: Float[Array, "B T"],
    correct: Float[Array, "B"],
    mask: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | None = None,
    token_weight: Float[Array, "B T"] | None = None,
    *,
    scale_by_advantage: bool = True,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Likelihood of right answers: the positive part of OREAL.

        x = -sg(w) * A * log pi    on rows with a right answer; averages run over these rows only

    Args:
      logprobs: log-probability of each token under the current policy.
      correct: 1 for a right answer, 0 for a wrong one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      advantages: A of each token, leave-one-out; needed where `scale_by_advantage`.
      token_weight: w, such as `outcome_token_weight`; None is 1.
      scale_by_advantage: True as in every released configuration; False is plain cloning (A = 1), the paper's text.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count, both over right answers.

    Raises:
      ValueError: for scale_by_advantage without advantages.

    Reference: OREAL (2502.06781).
    Certainty: verified
    """
    chex.assert_rank([logprobs, correct, mask], [2, 1, 2])
    chex.assert_equal_shape([logprobs, mask])
    if scale_by_advantage and advantages is None:
        raise ValueError(
            "scale_by_advantage is True, but there are no advantages; fill them (advantages: leave_one_out) or set "
            "scale_by_advantage to False"
        )
    scale = advantages if scale_by_advantage and advantages is not None else jnp.ones_like(mask)
    rows = jnp.where((correct > 0)[:, None], mask, 0)
    return policy_gradient(
        logprobs, scale, rows, token_weight, aggregation=aggregation, max_completion_tokens=max_completion_tokens
    )


@ranged
def failure_pushback(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    correct: Float[Array, "B"],
    mask: Float[Array, "B T"],
    token_weight: Float[Array, "B T"] | None = None,
    *,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """Policy gradient on wrong answers: the negative part of OREAL.

        x = -sg(w) * A * exp(log pi - sg(log pi))    on rows with a wrong answer; averages run over these rows only

    The gradient is that of REINFORCE; the value is the mean of -w A.

    Args:
      logprobs: log-probability of each token under the current policy.
      advantages: advantage of each token, leave-one-out, negative here.
      correct: 1 for a right answer, 0 for a wrong one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      token_weight: w, such as `outcome_token_weight`; None is 1.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count, both over wrong answers.

    Reference: OREAL (2502.06781).
    Certainty: verified
    """
    chex.assert_rank([logprobs, advantages, correct, mask], [2, 2, 1, 2])
    chex.assert_equal_shape([logprobs, advantages, mask])
    rows = jnp.where((correct > 0)[:, None], 0, mask)
    current = on_mask(logprobs, rows)
    per_token = -constant_factor(advantages, rows, token_weight) * jnp.exp(current - jax.lax.stop_gradient(current))
    return aggregate(per_token, rows, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


def token_reward_cross_entropy(
    token_reward_logits: Float[Array, "B T"], correct: Float[Array, "B"], mask: Float[Array, "B T"]
) -> Loss:
    """Training loss of the token reward model: the mean of its outputs is the log-odds of a right answer.

        x_b = -log sigmoid(s_b) if right, -log sigmoid(-s_b) if wrong,   s_b = mean_t z_bt

    Args:
      token_reward_logits: z, output of the current token reward model at each token.
      correct: 1 for a right answer, 0 for a wrong one.
      mask: 0 on tokens that do not count, the row's weight on those that do.

    Returns:
      The mean over rows as a sum and a count.

    Reference: OREAL (2502.06781).
    Certainty: verified
    """
    chex.assert_rank([token_reward_logits, correct, mask], [2, 1, 2])
    chex.assert_equal_shape([token_reward_logits, mask])
    tokens = jnp.maximum((mask > 0).sum(-1), 1)
    score = on_mask(token_reward_logits, mask).sum(-1) / tokens
    weights = row_weight(mask.astype(jnp.float32))
    surprise = jax.nn.softplus(jnp.where(correct > 0, -score, score))
    return Loss((weights * jnp.where(weights > 0, surprise, 0.0)).sum(), weights.sum())


@ranged
def outcome_token_weight(
    token_reward_logits: Float[Array, "B T"],
    correct: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    threshold: ShareBelowOne = 0.5,
    top_fraction: PositiveShare | None = None,
) -> Float[Array, "B T"]:
    """Weight of each token for the outcome, from a token reward model's mean output over the prefix.

        p_t = sigmoid(mean of z up to t),   u_t = p_t on right answers, 1 - p_t on wrong ones

        threshold      w = clip((u - threshold) / (1 - threshold), 0, 1)
        top_fraction   the largest u of the row, rescaled to [0, 1] (1 where they are all equal); 0 on the other tokens

    Args:
      token_reward_logits: z, output of the token reward model at each token, before the update.
      correct: 1 for a right answer, 0 for a wrong one.
      mask: non-zero on tokens that count.
      threshold: probability below which a token has no weight.
      top_fraction: share of a row's tokens that keep weight, at least one token; None uses the threshold (0.25 in the
        released alternative).

    Returns:
      One weight per token in [0, 1], without gradient; 0 outside the mask.

    Raises:
      ValueError: for a threshold outside [0, 1) or a fraction outside (0, 1].

    Reference: OREAL (2502.06781).
    Certainty: verified
    """
    chex.assert_rank([token_reward_logits, correct, mask], [2, 1, 2])
    chex.assert_equal_shape([token_reward_logits, mask])
    counted = mask > 0
    seen = jnp.cumsum(counted, axis=-1)
    opinion = jnp.cumsum(on_mask(token_reward_logits, mask), axis=-1) / jnp.maximum(seen, 1)
    surety = jax.nn.sigmoid(jnp.where((correct > 0)[:, None], opinion, -opinion))
    if top_fraction is None:
        weights = jnp.clip((surety - threshold) / (1 - threshold), 0.0, 1.0)
    else:
        kept_count = jnp.maximum(jnp.floor(seen[:, -1:] * top_fraction), 1)
        order = jnp.argsort(jnp.where(counted, -surety, jnp.inf), axis=-1)
        kept = (jnp.argsort(order, axis=-1) < kept_count) & counted
        largest = jnp.max(jnp.where(kept, surety, -jnp.inf), axis=-1, keepdims=True)
        smallest = jnp.min(jnp.where(kept, surety, jnp.inf), axis=-1, keepdims=True)
        spread = largest - smallest
        rescaled = jnp.where(spread > 0, (surety - smallest) / jnp.where(spread > 0, spread, 1.0), 1.0)
        weights = jnp.where(kept, rescaled, 0.0)
    return jax.lax.stop_gradient(jnp.where(counted, weights, 0.0))
