"""Sampling in rounds until a prompt has enough right and wrong samples: the stopping rule and the samples kept."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Count, ranged


@ranged
def finished_prompts(
    label: Float[Array, "N S"], drawn: Bool[Array, "N S"], *, kept: Count, both_kinds: bool = True
) -> Bool[Array, "N"]:
    """Prompts that need no further samples.

        P >= 1                                        positives alone
        P >= floor(n / 2) and Q >= n - floor(n / 2)   both kinds

    with P right and Q wrong samples drawn so far.

    Args:
      label: 1 for a right sample, 0 for a wrong one, in the order of arrival.
      drawn: whether the sample exists yet.
      kept: n, samples that a prompt keeps.
      both_kinds: use the second rule instead of the first.

    Returns:
      True for each finished prompt.

    Reference: Reinforce-Ada (2510.04996).
    Certainty: verified
    """
    right, wrong = _counts(label, drawn)
    if not both_kinds:
        return right >= 1
    return (right >= kept // 2) & (wrong >= kept - kept // 2)


@ranged
def balanced_samples(
    label: Float[Array, "N S"], drawn: Bool[Array, "N S"], *, kept: Count
) -> tuple[Int[Array, "N n"], Bool[Array, "N n"]]:
    """The samples that a prompt keeps: half of each kind if there are enough, the earliest of each kind.

        tp = min(floor(n / 2), P);  tn = min(n - tp, Q);  the rest is filled with right samples: tp = min(P, n - tn)

    Args:
      label: 1 for a right sample, 0 for a wrong one, in the order of arrival.
      drawn: whether the sample exists.
      kept: n, samples that a prompt keeps.

    Returns:
      (indices of the kept samples along S, right ones first; whether each entry is used, since a prompt may have fewer
      than n samples).

    Reference: Reinforce-Ada (2510.04996).
    Certainty: verified
    """
    chex.assert_equal_shape([label, drawn])
    right, wrong = _counts(label, drawn)
    wrong_kept = jnp.minimum(kept - jnp.minimum(kept // 2, right), wrong)
    right_kept = jnp.minimum(right, kept - wrong_kept)
    is_right, is_wrong = (label > 0) & drawn, (label <= 0) & drawn
    rank = lambda chosen: jnp.cumsum(chosen, axis=1) - 1  # noqa: E731
    last = 2 * label.shape[1]
    order = jnp.where(is_right & (rank(is_right) < right_kept[:, None]), rank(is_right), last)
    order = jnp.where(is_wrong & (rank(is_wrong) < wrong_kept[:, None]), label.shape[1] + rank(is_wrong), order)
    places = jnp.argsort(order, axis=1, stable=True)[:, :kept]
    return places, jnp.take_along_axis(order, places, axis=1) < last


def _counts(label: Array, drawn: Array) -> tuple[Array, Array]:
    return jnp.sum((label > 0) & drawn, axis=1), jnp.sum((label <= 0) & drawn, axis=1)
