"""Divergences between the policy and the reference as losses, each with a stated gradient.

The value of a divergence and its gradient are two questions. With u = policy / reference and D = E_reference[f(u)]:

    samples      value        gradient                 differentiated expression
    reference    f(u)         f'(u) u grad logprobs    the value itself (pathwise)
    policy       f(u) / u     f'(u) grad logprobs      f'(u), held fixed, times the score (score function)
    old policy   r f(u) / u   r f'(u) grad logprobs    the same through r = policy / old (importance corrected)
    none         sum over the vocabulary               the sum itself (exact)

Back-propagating f(u) / u on samples of the policy gives the gradient of another divergence, the one whose generator g
has g' = f' - f / u. Released code does so; it is available as gradient='pathwise'.

A token-level divergence is the sum over positions of the divergence between next-token distributions, with the visited
states held fixed. It equals the divergence between sequences only for a KL whose first argument generated the states;
level='sequence' estimates the divergence between sequences for every generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.divergences.generators import (
    LOG_RATIO_LIMIT,
    Direction,
    Generator,
    check_divergence,
    renyi,
)
from jaxrl_llm.losses.divergences.generators import (
    generator as generator_of,
)
from jaxrl_llm.ranges import Count, Positive, ranged

Samples = Literal["policy", "reference", "vocabulary", "top_k"]
Gradient = Literal["score_function", "importance_corrected", "pathwise", "exact"]
Level = Literal["token", "sequence"]

GRADIENTS: dict[str, tuple[str, ...]] = {  # per kind of samples, the right one first
    "policy": ("score_function", "importance_corrected", "pathwise"),
    "reference": ("pathwise",),
    "vocabulary": ("exact",),
    "top_k": ("exact",),
}
LEAST_LOGPROB = -1e4  # stands for the log-probability of an impossible symbol: exp gives 0, differences stay finite


def _finite(logprobs: Array) -> Array:
    return jax.lax.clamp(LEAST_LOGPROB, logprobs.astype(jnp.float32), jnp.inf)


def counted(mask: Array, *logprobs: Array) -> tuple[Array, ...]:
    """The log-probabilities in float32, 0 outside the mask, where inputs affect neither value nor gradient."""
    chex.assert_rank([mask, *logprobs], 2)
    chex.assert_equal_shape([mask, *logprobs])
    return tuple(_finite(jnp.where(mask > 0, x, 0.0)) for x in logprobs)


def _spread_over_row(row: Array, mask: Array) -> Array:
    """A row's value shared equally by its counted tokens, so that its sum over the row is the value."""
    counted = (mask > 0).astype(jnp.float32)
    return counted * (row / jnp.maximum(counted.sum(-1), 1.0))[:, None]


def _sampled(f: Generator, gradient: str, on_policy_samples: bool, value_limit: float | None, lp, ref, old) -> Array:
    """Value estimate of each sample, with the chosen gradient with respect to `lp`."""
    log_u = lp - stop_gradient(ref)
    if gradient == "pathwise":
        value = f.value_over_u(log_u) if on_policy_samples else f.value(log_u)
        return value if value_limit is None else jnp.minimum(value, value_limit)
    value, slope = stop_gradient((f.value_over_u(log_u), f.derivative(log_u)))
    # Differentiating r * f(u) / u through both factors gives r * f'(u) too, as a difference of large terms at small u.
    ratio = jnp.exp(jnp.clip(lp - stop_gradient(old), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return ratio * slope + stop_gradient(ratio * (value - slope))


@dataclass(frozen=True)
class VocabularyDivergence:
    """A divergence summed over next-token symbols inside the chunked pass over the vocabulary.

    Attributes:
      over_vocabulary: (log_p[..., V], log_q[..., V]) -> [...], the divergence between policy p and reference q at each
        position, from their log-softmax.
      aggregation, max_completion_tokens: as in `aggregate`.
    """

    over_vocabulary: Callable[[Array, Array], Array]
    aggregation: Aggregation
    max_completion_tokens: int | None

    def __call__(self, over_vocabulary: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Loss:
        """Aggregate the divergences of the positions, as the chunked pass computed them."""
        (per_token,) = counted(mask, over_vocabulary)
        return aggregate(
            per_token, mask, aggregation=self.aggregation, max_completion_tokens=self.max_completion_tokens
        )


@jax.custom_jvp
def _kept_and_rest(log_p: Array, index: Array, kept: Array) -> Array:
    """Log-probabilities at `index`, followed by that of all symbols with `kept` false together."""
    rest = jax.nn.logsumexp(jnp.where(kept, LEAST_LOGPROB, log_p), axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(log_p, index, axis=-1), rest], axis=-1)


@_kept_and_rest.defjvp
def _kept_and_rest_jvp(primals, tangents):
    log_p, index, kept = primals
    symbols = checkpoint_name(_kept_and_rest(log_p, index, kept), "top_k")
    # The rest is the total minus the kept symbols, so that the backward pass needs `index` but not `kept`, which would
    # require the reference's scores. A symbol of the rest has a share of at most 1; the bound concerns the kept ones.
    share_of_rest = lambda x: jnp.exp(jnp.minimum(x - symbols[..., -1:], 0.0))  # noqa: E731
    change = jnp.take_along_axis(tangents[0], index, axis=-1)
    of_all = jnp.sum(share_of_rest(log_p) * tangents[0], axis=-1, keepdims=True)
    of_kept = jnp.sum(share_of_rest(symbols[..., :-1]) * change, axis=-1, keepdims=True)
    return symbols, jnp.concatenate([change, of_all - of_kept], axis=-1)


def _symbols(samples: str, k: int, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """Log-probabilities of the symbols compared: all, or the reference's k largest and one symbol for all others."""
    log_p, log_q = _finite(log_p), stop_gradient(_finite(log_q))
    if samples == "vocabulary" or k >= log_q.shape[-1]:
        return log_p, log_q
    largest, index = jax.lax.top_k(log_q, k)
    index = checkpoint_name(index, "top_k")
    # top_k takes the lower index among equals, so a threshold and an index describe its choice without a scatter. Both
    # are read off as extremes: a slice of the result would keep XLA from seeing more in top_k than a whole sort.
    threshold = jnp.min(largest, axis=-1, keepdims=True)
    last = jnp.max(jnp.where(largest == threshold, index, -1), axis=-1, keepdims=True)
    kept = (log_q > threshold) | ((log_q == threshold) & (jnp.arange(log_q.shape[-1]) <= last))
    return _kept_and_rest(log_p, index, kept), checkpoint_name(_kept_and_rest(log_q, index, kept), "top_k")


def _summed(f: Generator, samples: str, k: int) -> Callable[[Array, Array], Array]:
    @jax.custom_jvp
    def divergence_of_symbols(log_p, log_q):
        # Terms are negative only by rounding. With `clamp`, unlike `maximum`, XLA fuses all of it into one loop on a
        # CPU.
        return jax.lax.clamp(0.0, f.perspective(log_p, log_q), jnp.inf)

    # Differentiating the perspective gives the same slope with several times as many operations.
    @divergence_of_symbols.defjvp
    def divergence_of_symbols_jvp(primals, tangents):
        return divergence_of_symbols(*primals), f.slope(*primals) * tangents[0]

    def f_divergence(log_p: Float[Array, "... V"], log_q: Float[Array, "... V"]) -> Float[Array, "..."]:
        return divergence_of_symbols(*_symbols(samples, k, log_p, log_q)).sum(-1)

    return f_divergence


def _summed_renyi(direction: str, samples: str, k: int, alpha: float) -> Callable[[Array, Array], Array]:
    def renyi_divergence(log_p: Float[Array, "... V"], log_q: Float[Array, "... V"]) -> Float[Array, "..."]:
        p, q = _symbols(samples, k, log_p, log_q)
        if direction == "reference_to_policy":
            p, q = q, p
        return renyi(jax.nn.logsumexp(alpha * p + (1 - alpha) * q, axis=-1), alpha=alpha)

    return renyi_divergence


def _check(name: str, samples: str, gradient: str | None, level: str, k: int | None, value_limit: float | None) -> None:
    if samples not in GRADIENTS:
        raise ValueError(f"samples is {samples!r}; it must be one of {', '.join(GRADIENTS)}")
    if gradient is not None and gradient not in GRADIENTS[samples]:
        raise ValueError(
            f"gradient is {gradient!r}, which does not exist for samples={samples!r}; it must be one of "
            f"{', '.join(GRADIENTS[samples])} (the first is the default)"
        )
    if level not in get_args(Level):
        raise ValueError(f"level is {level!r}; it must be one of {', '.join(get_args(Level))}")
    if level == "sequence" and samples in ("vocabulary", "top_k"):
        raise ValueError(
            f"level is 'sequence' with samples={samples!r}: sequences cannot be enumerated; use samples='policy' or "
            "samples='reference', or level='token'"
        )
    if level == "sequence" and gradient == "pathwise" and samples == "policy":
        raise ValueError(
            "gradient is 'pathwise' at level 'sequence' on samples of the policy, which is the gradient of another "
            "divergence; use gradient='score_function' or 'importance_corrected'"
        )
    if name == "renyi" and samples in ("policy", "reference"):
        raise ValueError(
            f"generator is 'renyi' with samples={samples!r}: the Rényi divergence is the logarithm of a mean, so its "
            "estimate and gradient on samples depend on the whole batch at once and cannot be a sum over tokens; use "
            "samples='vocabulary' or 'top_k', or generator='alpha' of the same order"
        )
    if samples != "top_k" and k is not None:
        raise ValueError(f"k is {k!r}, but samples={samples!r} keeps no k symbols; leave k out or use samples='top_k'")
    if value_limit is not None:
        pathwise = gradient == "pathwise" or (gradient is None and GRADIENTS[samples][0] == "pathwise")
        if not pathwise:
            raise ValueError(
                f"value_limit is {value_limit!r} with gradient={gradient!r} and samples={samples!r}; it applies "
                "to gradient='pathwise' only: leave it out, or use that gradient"
            )


@ranged
def divergence(
    *,
    generator: str = "reverse_kl",
    direction: Direction = "policy_to_reference",
    samples: Samples = "policy",
    gradient: Gradient | None = None,
    level: Level = "token",
    alpha: float = 0.5,
    mixture: float = 0.5,
    k: Count | None = None,
    value_limit: Positive | None = None,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Callable[..., Loss]:
    r"""A divergence between policy and reference as a loss, with correct value and gradient.

    With u = policy / reference, r = policy / old and sg the stop-gradient, per token (or per row, at level 'sequence',
    with log u summed over the counted tokens of the row):

        policy, score_function         value f(u)/u,    gradient f'(u) grad logprobs
        policy, importance_corrected   value r f(u)/u,  gradient r f'(u) grad logprobs
        policy, pathwise               value f(u)/u, differentiated: the gradient of the divergence with generator
                                       g' = f' - f/u instead (reverse KL, written as k3, follows forward KL)
        reference, pathwise            value f(u),      gradient f'(u) u grad logprobs
        vocabulary, exact              sum_v reference_v f(u_v), differentiated as it is
        top_k, exact                   the same over the reference's k most probable symbols and one that stands for
                                       all others: a lower bound, since merging symbols cannot add divergence

    `score_function` requires tokens sampled by the policy being differentiated (one update per batch); for further
    updates use `importance_corrected`. The k symbols are the reference's because the reference is fixed: the objective
    is then a smooth function of the parameters, while with the policy's own k it would jump as ranks change.

    Rényi is not an f-divergence. Its order is `alpha`, and it exists over the vocabulary and top_k only.

    Recipes: k3 differentiated directly as in released GRPO code = reverse_kl, policy, pathwise; value of k3 with the
    gradient of k2 = reverse_kl, policy, score_function; bias-corrected k3 = reverse_kl, policy, importance_corrected;
    DPH-F = forward_kl, reference, value_limit 10; DPH-JS = jensen_shannon, reference, with twice the coefficient;
    DPH-alpha of order a = alpha, reference, alpha = 1 - a.

    Args:
      generator: a name of `generators.generator`, or 'renyi'.
      direction: 'policy_to_reference' is D(policy || reference), 'reference_to_policy' D(reference || policy).
      samples: the distribution of the tokens, 'policy' or 'reference' (stored answers), or exact sums over symbols,
        'vocabulary' or 'top_k'.
      gradient: one of the forms above; None takes the right one for `samples`.
      level: 'token' compares next-token distributions at the visited states, 'sequence' whole sequences. A row's value
        is shared equally by its tokens, so aggregation='seq_mean_token_sum' averages sequences in nats per sequence and
        'token_mean' in nats per token.
      alpha: order of 'alpha' and 'renyi'.
      mixture: share of the first argument in the midpoint of 'jensen_shannon'.
      k: symbols kept by samples='top_k'; None keeps 64.
      value_limit: with gradient='pathwise', the largest value of one sample; no gradient beyond it. None: no limit.
      aggregation: as in `aggregate`.
      max_completion_tokens: constant of 'dr_grpo' and 'token_sum_const'.

    Returns:
      A loss of (logprobs, reference_logprobs, mask), and old_logprobs when importance corrected; for 'vocabulary' and
      'top_k' a loss of (over_vocabulary, mask) that carries the attribute `over_vocabulary`. Beyond |log u| = 20 (5 for
      the chi-squares) the value and weight of a sample are those at the bound.

    Raises:
      ValueError: options that are unknown or do not go together.

    Reference: f-divergences, derived; Schulman, Approximating KL divergence (2020); DPH-RL (2509.07430)
    Certainty: verified
    """
    check_divergence(generator, direction, alpha, mixture)
    _check(generator, samples, gradient, level, k, value_limit)
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation is {aggregation!r}; it must be one of {', '.join(get_args(Aggregation))}")
    form = gradient or GRADIENTS[samples][0]
    symbols = 64 if k is None else k
    if generator == "renyi":
        summed = _summed_renyi(direction, samples, symbols, alpha)
        return VocabularyDivergence(summed, aggregation, max_completion_tokens)
    f = generator_of(generator, direction=direction, alpha=alpha, mixture=mixture)
    if samples in ("vocabulary", "top_k"):
        return VocabularyDivergence(_summed(f, samples, symbols), aggregation, max_completion_tokens)

    def estimate(logprobs, reference_logprobs, mask, old_logprobs) -> Loss:
        lp, ref, old = counted(mask, logprobs, reference_logprobs, old_logprobs)
        if level == "sequence":
            rows = [x.sum(-1) for x in (lp, ref, old)]
            per_token = _spread_over_row(_sampled(f, form, samples == "policy", value_limit, *rows), mask)
        else:
            per_token = _sampled(f, form, samples == "policy", value_limit, lp, ref, old)
        return aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)

    def sampled_divergence(
        logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"], mask: Float[Array, "B T"]
    ) -> Loss:
        return estimate(logprobs, reference_logprobs, mask, stop_gradient(logprobs))

    def corrected_divergence(
        logprobs: Float[Array, "B T"],
        reference_logprobs: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        old_logprobs: Float[Array, "B T"],
    ) -> Loss:
        return estimate(logprobs, reference_logprobs, mask, old_logprobs)

    return corrected_divergence if form == "importance_corrected" else sampled_divergence
