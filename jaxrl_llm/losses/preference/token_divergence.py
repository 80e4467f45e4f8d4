"""DPO with the divergence of each answer's tokens from the reference: TDPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.divergences.divergence import divergence
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.ranges import NonNegative, Positive, ranged

SequentialForm = Literal["both", "worse"]


@dataclass(frozen=True)
class SequentialDivergencePreference:
    """The loss that `sequential_divergence_preference` configures.

    Attributes:
      beta, alpha, form: as there.
      over_vocabulary: (log_p[..., V], log_q[..., V]) -> [...], evaluated inside the chunked pass over the vocabulary.
    """

    beta: float
    alpha: float
    form: SequentialForm
    over_vocabulary: Callable[[Array, Array], Array]

    def __call__(
        self,
        logprobs: Float[Array, "B T"],
        reference_logprobs: Float[Array, "B T"],
        over_vocabulary: Float[Array, "B T"],
        group: Int[Array, "B"],
        preferred: Float[Array, "B"],
        mask: Float[Array, "B T"],
    ) -> Loss:
        """The pairs' loss; see `sequential_divergence_preference`."""
        chex.assert_rank([logprobs, reference_logprobs, over_vocabulary, mask, group, preferred], [2, 2, 2, 2, 1, 1])
        mask = mask.astype(jnp.float32)
        pairs = pairs_of(preferred, row_weight(mask), group)
        rho = (on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))).sum(-1)
        k = on_mask(over_vocabulary, mask).sum(-1)
        if self.form == "worse":
            k = jnp.where(preferred == 1, jax.lax.stop_gradient(k), k)
        z = self.beta * (pairs.gap(rho) + self.alpha * pairs.gap(k))
        metrics = {
            "preferred_share": (pairs.total(z > 0), pairs.count),
            "margin": (pairs.total(z), pairs.count),
            "divergence_gap": (pairs.total(-pairs.gap(k)), pairs.count),
        }
        return Loss(pairs.total(-jax.nn.log_sigmoid(z)), pairs.count, metrics)


@ranged
def sequential_divergence_preference(
    *, beta: Positive = 0.1, alpha: NonNegative = 0.5, form: SequentialForm = "worse"
) -> SequentialDivergencePreference:
    """TDPO: DPO whose margin includes the sequential KL of the reference to the policy along both answers.

        k = sum_t KL_t(pi_reference || pi)
        z = beta * (rho_better - rho_worse - alpha * (k_worse - k_better)),   rho = sum_t(log pi - log pi_reference)
        x = -log sigmoid(z)

    averaged over pairs, with the exact KL over the vocabulary at each token. "both" with alpha 1 is TDPO1; "worse" is
    TDPO2, in which k_better has no gradient. alpha 0 is DPO; where the policy equals the reference the loss is log 2.

    Args:
      beta: units of reward per nat.
      alpha: weight of the divergences.
      form: the answers whose divergence has a gradient.

    Returns:
      A loss of (logprobs, reference_logprobs, over_vocabulary, group, preferred, mask) that carries its own functional
      over the vocabulary. Metrics: `preferred_share`, `margin` (z) and `divergence_gap` (k_worse - k_better).

    Raises:
      ValueError: for an unknown form, or numbers out of range.

    Reference: TDPO (2404.11999).
    Certainty: verified
    """
    if form not in get_args(SequentialForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(SequentialForm))}")
    exact: Any = divergence(generator="forward_kl", samples="vocabulary")
    return SequentialDivergencePreference(beta, alpha, form, exact.over_vocabulary)
