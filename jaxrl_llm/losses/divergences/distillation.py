"""On-policy distillation: a teacher scores every token of the student's own samples."""

from __future__ import annotations

import math
from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.divergences.divergence import VocabularyDivergence
from jaxrl_llm.losses.divergences.generators import generator as generator_of
from jaxrl_llm.losses.ratio import log_ratio, on_mask
from jaxrl_llm.ranges import Count, OpenShare, Positive, ranged

Horizon = Literal["token", "rest"]


@ranged
def teacher_reverse_kl(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    teacher_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    horizon: Horizon = "token",
    log_ratio_limit: Positive = 20.0,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """KL(policy || teacher) on tokens that the policy drew, with its gradient.

        d = log pi - log pi_teacher,   r = pi / pi_old
        token   x_t = r_t * sg(d_t)
        rest    x_t = r_t * sg(d_t + d_{t+1} + ... + d_T)

    token is the divergence of next-token distributions at the visited states: the signal of a token is its own d alone.
    rest is the divergence of whole completions, whose gradient includes the effect of a token on later ones; it is
    noisier. The loss value is not the divergence, which is the metric.

    The network `teacher` is described in section networks, and needs the policy's vocabulary. The exact sum over the
    vocabulary is `divergence: {samples: vocabulary}`, with the teacher under the name `reference`.

    Args:
      logprobs: log-probability of each token under the current policy.
      old_logprobs: under the policy that the update starts from.
      teacher_logprobs: under the teacher.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      horizon: 'token', or 'rest' for the sum of d from each token on.
      log_ratio_limit: bound of |log r| before exp, and of |d|.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss as a sum and a count, with the metric `teacher_kl` (the mean of d, in nats per token).

    Raises:
      ValueError: for an unknown horizon, or a limit that is not positive.

    Reference: GKD (2306.13649); rest: MiniLLM (2306.08543).
    Certainty: recalled
    """
    chex.assert_rank([logprobs, old_logprobs, teacher_logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, teacher_logprobs, mask])
    if horizon not in get_args(Horizon):
        raise ValueError(f"horizon is {horizon!r}; it must be one of {', '.join(get_args(Horizon))}")
    mask = mask.astype(jnp.float32)
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs, mask, log_ratio_limit=log_ratio_limit))
    d = on_mask(logprobs, mask) - on_mask(teacher_logprobs, mask)
    d = stop_gradient(jnp.clip(d, -log_ratio_limit, log_ratio_limit))
    signal = d if horizon == "token" else jnp.cumsum(d[:, ::-1], axis=1)[:, ::-1]
    loss = aggregate(ratio * signal, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics={"teacher_kl": ((mask * d).sum(), mask.sum())})


@ranged
def skewed_divergence(
    *,
    generator: str = "forward_kl",
    skew: OpenShare = 0.1,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> VocabularyDivergence:
    """A divergence between teacher or policy and a mixture of both, over the whole vocabulary.

        forward_kl    KL(teacher || s teacher + (1 - s) policy)
        others        D_f(policy || s policy + (1 - s) teacher)

    with s = `skew`, and the exact gradient, through the mixture too. The mixture bounds the ratio, so value and
    gradient stay finite where one of the two has no mass. Select the teacher by `reads: {over_vocabulary:
    teacher_over_vocabulary}`.

    Args:
      generator: of the divergence, see `losses.generator`.
      skew: s, the share of the first argument in the mixture.
      aggregation: how positions are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Raises:
      ValueError: for an unknown generator, or a skew outside (0, 1).

    Reference: DistiLLM (2402.03898).
    Certainty: recalled
    """
    of_teacher = generator == "forward_kl"
    f = generator_of("reverse_kl" if of_teacher else generator)

    def over_vocabulary(log_p: Float[Array, "... V"], log_q: Float[Array, "... V"]) -> Float[Array, "..."]:
        first, second = (stop_gradient(log_q), log_p) if of_teacher else (log_p, stop_gradient(log_q))
        mixed = jnp.logaddexp(first + math.log(skew), second + math.log1p(-skew))
        return f.perspective(jnp.maximum(first, -1e4), mixed).sum(-1)

    return VocabularyDivergence(over_vocabulary, aggregation, max_completion_tokens)
