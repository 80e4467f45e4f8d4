"""Negative-aware fine-tuning: maximum likelihood also for wrong answers, under an implicit negative policy."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.ratio import on_mask, token_share
from jaxrl_llm.losses.siblings import compact_ids, sibling_sum
from jaxrl_llm.ranges import Count, NonNegative, Positive, Range, ranged

RatioLevel = Literal["token", "sequence"]
PromptWeight = Literal["failure_rate", "odds", "none"]


@ranged
def negative_aware_likelihood(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    correct: Float[Array, "B"],
    group: Int[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    level: RatioLevel = "token",
    prompt_weight: PromptWeight = "failure_rate",
    floor: Positive = 1.0,
    negative_weight: NonNegative = 1.0,
    least_rate: Annotated[float, Range(0, 0.5, open="()")] = 0.02,
    log_ratio_limit: Positive = 10.0,
    aggregation: Aggregation = "token_sum_const",
    max_completion_tokens: Count | None = 1000,
) -> Loss:
    """NFT: likelihood of right answers under the policy, and of wrong ones under its implicit negative policy.

    A prompt answered rightly with rate q splits the old policy into q * positive + (1 - q) * negative. With the
    positive one as the new policy, R = pi / pi_old, the negative one has the ratio (1 - q R) / (1 - q):

        right   x = -c * log R
        wrong   x = -c * negative_weight * log max((1 - q R) / (1 - q), floor), the gradient passing through the max

        c   failure_rate  1 - q                (on fresh samples the gradient of Dr.GRPO)
            odds          sqrt((1 - q) / q)    (that of GRPO with the population's deviation)
            none          1

    q is the share of right answers in the row's group. Groups all right or all wrong contribute nothing. The released
    sequence form has level 'sequence' and max_completion_tokens 1.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that sampled it.
      correct: 1 for a right answer, 0 for a wrong one.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      level: a ratio for each token, or one for the sequence, whose loss is spread evenly over the row's tokens.
      prompt_weight: the factor c.
      floor: least ratio of the negative policy, above 0; at 1 the weight of a wrong token never grows.
      negative_weight: factor on wrong answers (0.5 for the largest model of the paper).
      least_rate: q is clipped to [least_rate, 1 - least_rate].
      log_ratio_limit: largest log R before exp.
      aggregation: how token losses are averaged; the released sum over tokens / 1000 is the default.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `floor_share` (tokens of wrong answers at the floor).

    Raises:
      ValueError: for an unknown level or prompt weight, or a floor, weight or rate out of range.

    Reference: NFT (2505.18116).
    Certainty: verified
    """
    chex.assert_rank([logprobs, old_logprobs, mask, correct, group], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    _check(level, prompt_weight)
    counted, right = mask > 0, (correct > 0)[:, None]
    difference = on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(old_logprobs, mask))
    # Bounded below as well, so that a token of probability 0 does not make the loss of a right answer infinite.
    difference = jnp.clip(difference, -1e4, log_ratio_limit if level == "token" else 1e4)
    spread = jnp.ones_like(difference)
    if level == "sequence":
        difference = jnp.minimum(difference.sum(-1, keepdims=True), log_ratio_limit) * spread
        spread = spread / jnp.maximum(counted.sum(-1, keepdims=True), 1)

    rate, mixed = _success_rate(correct, group, row_weight(mask.astype(jnp.float32)))
    rate = jnp.clip(rate, least_rate, 1 - least_rate)[:, None]
    negative_ratio = (1 - rate * jnp.exp(difference)) / (1 - rate)
    bounded = jax.lax.stop_gradient(jnp.maximum(negative_ratio, floor))
    # Exactly 0 in value: passes the gradient through the floor without the rounding of a large sum.
    through = negative_ratio - jax.lax.stop_gradient(negative_ratio)
    wrong_loss = negative_weight * (-jnp.log(bounded) - through / bounded)
    factor = {"failure_rate": 1 - rate, "odds": jnp.sqrt((1 - rate) / rate), "none": jnp.ones_like(rate)}[prompt_weight]
    per_token = jnp.where(mixed[:, None] & counted, factor * spread * jnp.where(right, -difference, wrong_loss), 0.0)
    loss = aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    at_floor = mixed[:, None] & ~right & (jax.lax.stop_gradient(negative_ratio) < floor)
    return loss._replace(metrics={"floor_share": token_share(at_floor, mask)})


def _success_rate(correct: Array, group: Array, weights: Array) -> tuple[Array, Array]:
    """(share of right answers in the row's group, whether the group holds both kinds)."""
    ids = compact_ids(group)
    right = jnp.where((correct > 0) & (weights > 0), weights, 0.0)
    total, passed = sibling_sum(weights, ids), sibling_sum(right, ids)
    failed = sibling_sum(weights - right, ids)
    return passed / jnp.where(total > 0, total, 1.0), (passed > 0) & (failed > 0)


def _check(level, prompt_weight):
    if level not in get_args(RatioLevel):
        raise ValueError(f"level is {level!r}; it must be one of {', '.join(get_args(RatioLevel))}")
    if prompt_weight not in get_args(PromptWeight):
        raise ValueError(f"prompt_weight is {prompt_weight!r}; it must be one of {', '.join(get_args(PromptWeight))}")
