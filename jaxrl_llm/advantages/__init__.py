"""Advantages: rewards -> one number a row or a token that says how much better than expected it was.

Each is a pure function whose positional parameters are named after fields of `Experience`.
"""

from __future__ import annotations

from jaxrl_llm.advantages.group_relative.agreement import (
    answer_entropy,
    batch_normalized_accuracy,
    consistency_blended,
    local_share,
    majority_match,
    paired_majority_match,
)
from jaxrl_llm.advantages.group_relative.best_of_k import max_at_k_weights, pass_at_k_normalized, top_margin
from jaxrl_llm.advantages.group_relative.beta_normalized import beta_normalized, beta_normalized_components
from jaxrl_llm.advantages.group_relative.budgets import budget_advantages, budget_rewards, sample_budgets
from jaxrl_llm.advantages.group_relative.decoupled import decoupled_normalized
from jaxrl_llm.advantages.group_relative.group_baselines import (
    group_normalized,
    leave_one_out,
    length_weighted_baseline,
)
from jaxrl_llm.advantages.group_relative.pool_centred import pool_centred
from jaxrl_llm.advantages.group_relative.risk import group_quantile, mixed_value_at_risk, tracked_mixed_value_at_risk
from jaxrl_llm.advantages.group_relative.shifted_baselines import log_mean_exp_baseline, shifted_mean_baseline
from jaxrl_llm.advantages.group_relative.solved_groups import solved_group_length_penalty
from jaxrl_llm.advantages.group_relative.win_rates import score_win_rate, win_rate
from jaxrl_llm.advantages.process.turn_credit import taken_turns, turn_leave_one_out, turn_mixed_normalized
from jaxrl_llm.advantages.reinforce.baselines import raw_rewards, reward_minus_baseline, running_mean_baseline
from jaxrl_llm.advantages.reinforce.filters import sigma_filtered
from jaxrl_llm.advantages.reinforce.signed import signed_correctness
from jaxrl_llm.advantages.reinforce.whitening import reinforce_plus_plus_baseline, whitened
from jaxrl_llm.advantages.shaping.confidence import confidence_shaped, low_probability_confidence
from jaxrl_llm.advantages.shaping.effective_rank import effective_rank, rank_bonus, rank_dynamics, rank_shaped
from jaxrl_llm.advantages.shaping.entropy_steering import entropy_mixed_advantages, steered_advantages
from jaxrl_llm.advantages.shaping.sharpening import novelty_sharpened
from jaxrl_llm.advantages.value_based.gae import (
    discounted_returns,
    gae,
    gae_returns,
    generalized_advantages,
    kl_penalized_rewards,
    outcome_token_rewards,
    reinforce_plus_plus,
)
from jaxrl_llm.advantages.value_based.twin_critic import soft_minimum, twin_baseline_normalized

# What now has a room of its own can still be named here.
from jaxrl_llm.schedules import steering_temperature, temperature_controller
from jaxrl_llm.selection import (
    balanced_groups,
    balanced_samples,
    best_and_random,
    extreme_rewards,
    extreme_samples,
    finished_prompts,
    knapsack_rollouts,
    mixed_probability,
    near_perfect_groups,
    next_rollouts,
    nonconstant_groups,
    nonzero_advantages,
    one_success_one_failure,
    resampled,
    reward_half_width,
    rollout_priority,
    rollout_value,
    rollouts_for_signal,
    squared_correlation,
    steered_batch,
)
from jaxrl_llm.statistics import (
    group_leader,
    group_max,
    group_mean,
    group_min,
    group_rank,
    group_size,
    group_std,
    group_sum,
    moments,
    present,
    sampled_entropy,
    subgroup_ids,
    token_weights,
)

__all__ = [
    "answer_entropy",
    "balanced_groups",
    "balanced_samples",
    "batch_normalized_accuracy",
    "best_and_random",
    "beta_normalized",
    "beta_normalized_components",
    "budget_advantages",
    "budget_rewards",
    "confidence_shaped",
    "consistency_blended",
    "decoupled_normalized",
    "discounted_returns",
    "effective_rank",
    "entropy_mixed_advantages",
    "extreme_rewards",
    "extreme_samples",
    "finished_prompts",
    "gae",
    "gae_returns",
    "generalized_advantages",
    "group_leader",
    "group_max",
    "group_mean",
    "group_min",
    "group_normalized",
    "group_quantile",
    "group_rank",
    "group_size",
    "group_std",
    "group_sum",
    "kl_penalized_rewards",
    "knapsack_rollouts",
    "leave_one_out",
    "length_weighted_baseline",
    "local_share",
    "log_mean_exp_baseline",
    "low_probability_confidence",
    "majority_match",
    "max_at_k_weights",
    "mixed_probability",
    "mixed_value_at_risk",
    "moments",
    "near_perfect_groups",
    "next_rollouts",
    "nonconstant_groups",
    "nonzero_advantages",
    "novelty_sharpened",
    "one_success_one_failure",
    "outcome_token_rewards",
    "paired_majority_match",
    "pass_at_k_normalized",
    "pool_centred",
    "present",
    "rank_bonus",
    "rank_dynamics",
    "rank_shaped",
    "raw_rewards",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "resampled",
    "reward_half_width",
    "reward_minus_baseline",
    "rollout_priority",
    "rollout_value",
    "rollouts_for_signal",
    "running_mean_baseline",
    "sample_budgets",
    "sampled_entropy",
    "score_win_rate",
    "shifted_mean_baseline",
    "sigma_filtered",
    "signed_correctness",
    "soft_minimum",
    "solved_group_length_penalty",
    "squared_correlation",
    "steered_advantages",
    "steered_batch",
    "steering_temperature",
    "subgroup_ids",
    "taken_turns",
    "temperature_controller",
    "token_weights",
    "top_margin",
    "tracked_mixed_value_at_risk",
    "turn_leave_one_out",
    "turn_mixed_normalized",
    "twin_baseline_normalized",
    "whitened",
    "win_rate",
]
