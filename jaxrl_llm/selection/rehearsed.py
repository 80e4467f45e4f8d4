"""Which prompts are rehearsed instead of explored, and which stored answers a step rehearses."""

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
    """1 in groups whose prompt the policy solves reliably, 0 in those that it still has to explore.

        sum_{j <= attempts} correct_j >= min_correct    over the samples j of the group

    Made once, on answers of the initial policy. A near-perfect prompt gets one stored answer of that policy, kept if
    correct, and is only rehearsed (`losses.rehearsal_divergence`); all others, the unsolvable ones too, are trained on
    with a reward.

    Args:
      correct: above 0 in rows whose answer is right.
      sample: number of the sample within its group, from 0.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      attempts: samples of a prompt that are looked at (4 in the released script; its comment has 8).
      min_correct: how many of them must be right (4; the comment has 6).

    Returns:
      1 or 0 a row, 0 in absent rows.

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
    """Row numbers of the stored answers that a step rehearses: every pass over them in a new order, none left out.

    The order depends on the key and the number of the pass only, so a resumed run goes on where it was.

    Args:
      key: random key of the rehearsal.
      step: number of the step, from 0.
      stored: how many answers there are.
      rows_per_step: how many a step takes; may exceed `stored`.

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
    # A step touches this many passes at most.
    passes = first_pass + jnp.arange((rows_per_step - 1) // stored + 2)
    orders = jax.vmap(lambda number: jax.random.permutation(jax.random.fold_in(key, number), stored))(passes)
    position = first + jnp.arange(rows_per_step)
    return orders[position // stored - first_pass, position % stored]
