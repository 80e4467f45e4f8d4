"""Token budgets: the samples of a prompt have several target lengths, each with its own target reward."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.group_relative.group_baselines import group_normalized
from jaxrl_llm.ranges import Count, NonNegative, ranged
from jaxrl_llm.statistics import group_mean, present, subgroup_ids


@ranged
def sample_budgets(
    sample: Int[Array, "B"], *, samples_per_prompt: Count, budgets: Sequence[Count] = (512, 1024, 2048, 2560)
) -> Int[Array, "B"]:
    """The token budget of each sample: the samples of a prompt in equal blocks, one for each budget.

    The prompt, or the prefilled start of the answer, states the budget.

    Args:
      sample: number of the sample within its group.
      samples_per_prompt: samples of a prompt, a multiple of the number of budgets.
      budgets: in tokens.

    Returns:
      One budget per row.

    Raises:
      ValueError: for no budgets, or samples that do not divide among them.

    Reference: HBPO (2507.15844).
    Certainty: verified
    """
    chex.assert_rank(sample, 1)
    if not budgets or samples_per_prompt % len(budgets):
        raise ValueError(
            f"samples_per_prompt is {samples_per_prompt}, which the {len(budgets)} budgets {tuple(budgets)} do not "
            "divide; take a multiple"
        )
    block = jnp.clip(sample // (samples_per_prompt // len(budgets)), 0, len(budgets) - 1)
    return jnp.asarray(budgets, jnp.int32)[block]


@ranged
def budget_target(budget: Int[Array, "B"], *, max_completion_tokens: Count) -> Float[Array, "B"]:
    """Reward of a right answer that uses its whole budget: 4 * cos(pi * budget / (2 * max_completion_tokens))."""
    return 4.0 * jnp.cos(jnp.pi * budget.astype(jnp.float32) / (2 * max_completion_tokens))


@ranged
def budget_rewards(
    correct: Float[Array, "B"],
    length: Int[Array, "B"],
    budget: Int[Array, "B"],
    well_formed: Float[Array, "B"] | None = None,
    *,
    max_completion_tokens: Count,
    malformed_reward: float = -1.0,
) -> Float[Array, "B"]:
    """HBPO's reward: higher for short right answers and near the budget, bounded by the budget's target reward.

        min(4 cos(pi n / 2L) - |b - n| / L, 4 cos(pi b / 2L))    right, and n <= L
        0                                                        wrong or longer
        malformed_reward                                         without a final answer

    with n the length, b the budget and L = max_completion_tokens.

    Args:
      correct: 1 for a right answer, 0 for a wrong one.
      length: completion tokens of each row.
      budget: token budget of each row.
      well_formed: 1 where there is a final answer to judge; None takes every row to have one.
      max_completion_tokens: L, also the length from which the cosine is 0.
      malformed_reward: reward where `well_formed` is 0.

    Returns:
      One reward per row.

    Raises:
      ValueError: for a length limit below 1.

    Reference: HBPO (2507.15844).
    Certainty: verified
    """
    chex.assert_rank([correct, length, budget], 1)
    chex.assert_equal_shape([correct, length, budget])
    target = budget_target(budget, max_completion_tokens=max_completion_tokens)
    short = budget_target(length, max_completion_tokens=max_completion_tokens)
    distance = jnp.abs(budget - length).astype(jnp.float32) / max_completion_tokens
    paid = jnp.minimum(short - distance, target)
    rewards = jnp.where((correct > 0) & (length <= max_completion_tokens), paid, 0.0)
    return rewards if well_formed is None else jnp.where(well_formed > 0, rewards, malformed_reward)


@ranged
def budget_advantages(
    rewards: Float[Array, "B"],
    budget: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    max_completion_tokens: Count,
    budget_coefficient: NonNegative = 1.0,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B"]:
    """HBPO: advantage within the prompt, plus the mean reward of the row's budget minus that budget's target reward.

        A = (r - mean_group) / (std_group + eps) + budget_coefficient * (m - budget_target)
        m = mean of r over the group's samples of the same budget

    Args:
      rewards: `budget_rewards` of each row.
      budget: token budget of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      max_completion_tokens: as for the rewards.
      budget_coefficient: 1 is the method; the released code adds the term twice, which is 2.
      eps: added to the deviation.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for a length limit below 1.

    Reference: HBPO (2507.15844).
    Certainty: verified
    """
    chex.assert_rank([rewards, budget, group, weight], 1)
    within = group_normalized(rewards, group, weight, eps=eps)
    reached = group_mean(rewards, subgroup_ids(group, budget), weight)
    promised = budget_target(budget, max_completion_tokens=max_completion_tokens)
    return present(within + budget_coefficient * (reached - promised), weight)
