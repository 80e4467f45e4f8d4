"""Policy learning as regression on the value of the uniformly random policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.ratio import log_ratio, on_mask
from jaxrl_llm.ranges import Count, Positive, ranged


def mean_log_ratio(log_p: Float[Array, "... V"], log_q: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Mean over the vocabulary of log p - log q, each log-probability bounded below so that none is infinite.

    >>> uniform = jnp.log(jnp.full(2, 0.5))
    >>> float(mean_log_ratio(uniform, uniform))
    0.0
    """
    bounded = lambda x: jnp.maximum(x.astype(jnp.float32), -1e4)  # noqa: E731
    return jnp.mean(bounded(log_p) - bounded(log_q), axis=-1)


@dataclass(frozen=True)
class RandomPolicyValuation:
    """The loss that `random_policy_valuation` configures.

    Attributes:
      scale, aggregation, max_completion_tokens: as in `random_policy_valuation`.
      over_vocabulary: (log_p[..., V], log_q[..., V]) -> [...], evaluated inside the chunked pass over the vocabulary.
    """

    scale: float
    aggregation: Aggregation
    max_completion_tokens: int | None
    over_vocabulary: Callable[[Array, Array], Array] = mean_log_ratio

    def __call__(
        self,
        logprobs: Float[Array, "B T"],
        old_logprobs: Float[Array, "B T"],
        advantages: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        over_vocabulary: Float[Array, "B T"],
    ) -> Loss:
        """Regress the log-ratios on reward plus next value; see `random_policy_valuation`."""
        chex.assert_rank([logprobs, old_logprobs, advantages, mask, over_vocabulary], 2)
        chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask, over_vocabulary])
        following = jnp.pad(on_mask(over_vocabulary, mask)[:, 1:], ((0, 0), (0, 1)))
        target = jax.lax.stop_gradient(on_mask(advantages, mask) + self.scale * following)
        # A far wider bound than PPO's: without an exp only the square must stay finite.
        value = self.scale * log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=1e4)
        averaged = {"aggregation": self.aggregation, "max_completion_tokens": self.max_completion_tokens}
        return aggregate(jnp.square(value - target), mask, **averaged)


@ranged
def random_policy_valuation(
    *, scale: Positive = 1.0, aggregation: Aggregation = "token_mean", max_completion_tokens: Count | None = None
) -> RandomPolicyValuation:
    """ROVER: the policy's log-ratio is fitted to the value of choosing uniformly at random.

        q_t = scale * (log pi_t - log pi_old_t)
        x = (q_t - sg(A_t + scale * c_{t+1}))^2,   c = mean over the vocabulary of log pi - log pi_old

    c_{t+1} is that of the next position, 0 outside the mask and after the last column. Without critic, clipping, KL or
    entropy term; the gradient runs through q alone.

    A is the reward minus the mean of its group on every token (group_normalized, scale none; with scale group it is the
    variant for mathematics). c compares the current policy with the reference, so the reference must be the policy that
    the update starts from: refresh it at every step. With one update per batch c is 0 and the gradient is that of
    REINFORCE with A, times 2 * scale.

    Args:
      scale: rho, units of value per nat.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      A loss of (logprobs, old_logprobs, advantages, mask, over_vocabulary) that carries its own functional over the
      vocabulary.

    Raises:
      ValueError: for a scale that is not positive or an unknown aggregation.

    Reference: ROVER (2509.24981).
    Certainty: verified
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation is {aggregation!r}; it must be one of {', '.join(get_args(Aggregation))}")
    return RandomPolicyValuation(scale, aggregation, max_completion_tokens)
