"""Sampled estimates: the k estimators of KL, a divergence as a reward, DPH-RL's second form.

`divergence` is the family with its gradients; the functions here serve as metrics, as rewards, or for published methods
written in this form.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.divergences.divergence import counted
from jaxrl_llm.losses.divergences.generators import LOG_RATIO_LIMIT, Direction, clamped
from jaxrl_llm.losses.divergences.generators import generator as generator_of
from jaxrl_llm.ranges import Count, ranged

Estimator = Literal["k1", "k2", "k3"]

VALUE_LIMIT = 10.0  # of k3, as in released code


@ranged
def kl_estimate(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    estimator: Estimator = "k3",
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    r"""KL(policy || reference) estimated on tokens sampled by the policy, differentiated directly.

    With d = logprobs - reference_logprobs:

        k1  d                 unbiased value; its gradient is 0 in expectation: useless as a loss
        k2  d^2 / 2           biased value; its gradient d * grad logprobs is that of KL(policy || reference)
        k3  exp(-d) + d - 1   unbiased value; its gradient is that of KL(reference || policy), the other direction

    All three are metrics; k2 and k3 are also losses. For the value of k3 with the gradient of k2 use
    `divergence(generator='reverse_kl')`, and for tokens drawn by an earlier policy its importance-corrected form. As in
    released code d is clipped to +-20 in the exponent and k3 to 10, and k3 has no gradient beyond.

    Args:
      logprobs: of the sampled tokens under the current policy.
      reference_logprobs: of the same tokens under the reference.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      estimator: 'k1', 'k2' or 'k3'.
      aggregation, max_completion_tokens: as in `aggregate`.

    Returns:
      The estimate in nats per token as (numerator, denominator).

    Raises:
      ValueError: for an unknown estimator.

    Reference: Schulman, Approximating KL divergence (2020); k3 as a loss: GRPO (2402.03300)
    Certainty: verified
    """
    lp, ref = counted(mask, logprobs, reference_logprobs)
    d = lp - stop_gradient(ref)
    match estimator:
        case "k1":
            per_token = d
        case "k2":
            per_token = d**2 / 2
        case "k3":
            d = jnp.clip(d, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            per_token = jnp.minimum(jnp.expm1(-d) + d, VALUE_LIMIT)
        case _:
            raise ValueError(f"estimator is {estimator!r}; it must be one of {', '.join(get_args(Estimator))}")
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)


@ranged
def divergence_reward(
    old_logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    beta: float,
    generator: str = "reverse_kl",
    direction: Direction = "policy_to_reference",
    alpha: float = 0.5,
    mixture: float = 0.5,
) -> Float[Array, "B T"]:
    r"""A divergence as a reward for each token: -beta * f'(u), the score function as part of the return.

    A policy gradient on this reward descends beta * D_f(policy || reference) at the visited states; for reverse KL,
    f'(u) = log u is k1, and summed over the rest of the completion it descends the KL between sequences.

    Args:
      old_logprobs: of the sampled tokens under the policy that sampled them.
      reference_logprobs: of the same tokens under the reference.
      mask: 0 on tokens that do not count; the reward there is 0.
      beta: strength, in units of reward per nat.
      generator, direction, alpha, mixture: as in `generators.generator`.

    Returns:
      The reward of each token, without gradient.

    Raises:
      ValueError: for an unknown generator or options that do not fit it.

    Reference: f-divergences, derived; k1 in the reward as in PPO for language models (1909.08593)
    Certainty: verified
    """
    f = generator_of(generator, direction=direction, alpha=alpha, mixture=mixture)
    lp, ref = counted(mask, old_logprobs, reference_logprobs)
    return stop_gradient(jnp.where(mask > 0, -beta * f.derivative(lp - ref), 0.0))


@ranged
def js_definition(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    samples: Literal["reference", "policy"] = "reference",
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    r"""One half of Jensen-Shannon by its definition: KL to the midpoint from the distribution that sampled the tokens.

    With M = (policy + reference) / 2 at the sampled token and k3(a, b) = b / a - 1 - log(b / a), differentiated
    directly:

        reference   k3(reference, M)   KL(reference || M), in value and in gradient
        policy      k3(policy, M)      KL(policy || M) in value; its gradient is that of another divergence, as for any
                                       sampled value differentiated on tokens of the policy

    The sum of both halves is twice the normalised Jensen-Shannon divergence. DPH-RL takes the first on stored answers
    and the second on rollouts, the latter on one microbatch in ten (a coefficient of 0.1 in expectation). For the
    correct gradient of the whole use `divergence(generator='jensen_shannon')`.

    Args:
      logprobs: of the tokens under the current policy.
      reference_logprobs: of the same tokens under the reference.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      samples: the distribution that the tokens were sampled from.
      aggregation, max_completion_tokens: as in `aggregate`.

    Returns:
      The half in nats per token as (numerator, denominator).

    Raises:
      ValueError: for another `samples`.

    Reference: DPH-RL (2509.07430)
    Certainty: verified
    """
    if samples not in ("reference", "policy"):
        raise ValueError(f"samples is {samples!r}; it must be 'reference' or 'policy'")
    lp, ref = counted(mask, logprobs, reference_logprobs)
    log_u = clamped(lp - stop_gradient(ref), LOG_RATIO_LIMIT)
    to_drawer = log_u if samples == "reference" else -log_u
    # log(M / drawer) = log((1 + exp(x)) / 2) with x the log-ratio of the other distribution to the drawer.
    log_midpoint = jnp.logaddexp(to_drawer, 0.0) - jnp.log(2.0)
    per_token = jnp.minimum(jnp.expm1(log_midpoint) - log_midpoint, VALUE_LIMIT)
    return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
