"""Rehearsal: prompts to rehearse instead of explore, and the stored answers of each step."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.statistics import group_sum, present


@ranged
def near_perfect_groups(
    correct: Float[Array, "B"],
    sample: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    attempts: Count = 4,
    min_correct: Count = 4,
) -> Float[Array, "B"]:
    """1 in groups whose prompt the policy solves reliably, 0 in the other groups, which are explored.

        sum_{j <= attempts} correct_j >= min_correct    over the samples j of the group

    Computed once, on answers of the initial policy. For a near-perfect prompt one answer of that policy is stored if it
    is correct, and the prompt is only rehearsed (`losses.rehearsal_divergence`); all other prompts, including
    unsolvable ones, are trained on with a reward.

    Args:
      correct: positive in rows with a right answer.
      sample: number of the sample within its group, from 0.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      attempts: samples per prompt to count (4 in the released script; its comment says 8).
      min_correct: number of them that must be right (4 in the script; its comment says 6).

    Returns:
      1 or 0 per row, 0 in absent rows.

    Raises:
      ValueError: unless 1 <= min_correct <= attempts.

    Reference: DPH-RL (2509.07430).
    Certainty: verified
    """
    if not 1 <= min_correct <= attempts:
        raise ValueError(f"min_correct is {min_correct}; it must be between 1 and attempts, which is {attempts}")
    there = (weight > 0).astype(jnp.float32)
    solved = (present(correct, weight) > 0) & (sample < attempts)
    found = group_sum(solved.astype(jnp.float32), group, there)
    return present((found >= min_correct).astype(jnp.float32), weight)


@ranged
def cycled_rows(key: Array, step: Int[Array, ""] | int, *, stored: Count, rows_per_step: Count) -> Int[Array, "N"]:
    """Row numbers of the stored answers of a step: every pass covers all rows once, in a new random order.

    The order depends only on the key and the number of the pass, so a resumed run continues the sequence.

    Args:
      key: random key.
      step: number of the step, from 0.
      stored: number of stored answers.
      rows_per_step: rows per step; may exceed `stored`.

    Returns:
      `rows_per_step` numbers in [0, stored).

    Raises:
      ValueError: for no stored answers or no rows.

    Reference: DPH-RL (2509.07430).
    Certainty: verified
    """
    step = jnp.asarray(step, jnp.int32)
    chex.assert_rank(step, 0)
    first = step * rows_per_step
    first_pass = first // stored
    # A step spans at most this many passes.
    passes = first_pass + jnp.arange((rows_per_step - 1) // stored + 2)
    orders = jax.vmap(lambda number: jax.random.permutation(jax.random.fold_in(key, number), stored))(passes)
    position = first + jnp.arange(rows_per_step)
    return orders[position // stored - first_pass, position % stored]
