"""Rewards from unit tests, weighted by difficulty and by the density of similar tests."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, Positive, ranged
from jaxrl_llm.statistics import group_mean


@ranged
def weighted_tests(
    test_passes: Float[Array, "B ... J"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    difficulty: NonNegative = 1.0,
    width: Positive = 0.2,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B ..."]:
    """Weighted sum of passed tests, with larger weights for rarely passed tests and smaller ones for similar tests.

        rho_j = mean_{i,s} p_{i,s,j}
        density_j = sum_k exp(-(rho_j - rho_k)^2 / (2 * width^2))
        w_j = exp(-difficulty * rho_j) / (density_j + eps)
        r_{i,s} = sum_j w_j * p_{i,s,j}

    with the mean over all turns s of the samples i of the group, and k over all tests including j.

    Test suites are skewed to easy tests, which dominate a plain share of passed tests; dividing by the density makes
    copies of a test count about once. The constants are our choice. For conversations pass the result to
    `outcome_and_turn_centred`; for single turns add it to the outcome's reward.

    Args:
      test_passes: p, 1 for a passed test, else 0: [B, J], or [B, S, J] after each of S turns. NaN for tests that a
        prompt lacks and turns that a row lacks.
      group: id of the group each row belongs to.
      weight: 0 for absent rows.
      difficulty: alpha, rate at which weights fall with the pass rate.
      width: sigma, kernel width in units of pass rate.
      eps: added to the density.

    Returns:
      One reward per row, or per turn, float32; 0 where no test applies.

    Reference: VeRPO (2601.03525).
    Certainty: recalled
    """
    passes = test_passes.astype(jnp.float32)
    chex.assert_rank([group, weight], 1)
    by_turn = passes.reshape(len(group), -1, passes.shape[-1])
    known = ~jnp.isnan(by_turn) & (weight > 0)[:, None, None]
    passed, count = jnp.where(known, by_turn, 0.0).sum(axis=1), known.sum(axis=1).astype(jnp.float32)
    # The mean over all turns is the mean over rows, weighted by their number of turns.
    share = jax.vmap(group_mean, in_axes=(1, None, 1), out_axes=1)
    rho = share(passed / jnp.maximum(count, 1.0), group, count)
    exists = share((count > 0).astype(jnp.float32), group, jnp.broadcast_to(weight[:, None] > 0, count.shape) * 1.0) > 0
    alike = jnp.exp(-jnp.square(rho[:, :, None] - rho[:, None, :]) / (2 * width**2))
    density = jnp.where(exists[:, None, :], alike, 0.0).sum(axis=2)
    factor = jnp.where(exists, jnp.exp(-difficulty * rho) / (density + eps), 0.0)
    return (factor[:, None, :] * jnp.where(known, by_turn, 0.0)).sum(axis=2).reshape(passes.shape[:-1])
