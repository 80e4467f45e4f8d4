"""Advantages: rewards -> one number a row or a token that says how much better than expected it was.

Each is a pure function whose positional parameters are named after fields of `Experience`.
"""

from jaxrl_llm.advantages.adaptive import balanced_samples, finished_prompts, pool_centred
from jaxrl_llm.advantages.allocation import next_rollouts, reward_half_width, rollout_priority
from jaxrl_llm.advantages.baselines import raw_rewards, reward_minus_baseline, running_mean_baseline
from jaxrl_llm.advantages.beta_normalized import beta_normalized, beta_normalized_components
from jaxrl_llm.advantages.budgets import budget_advantages, budget_rewards, sample_budgets
from jaxrl_llm.advantages.confidence import confidence_shaped
from jaxrl_llm.advantages.consistency import (
    answer_entropy,
    batch_normalized_accuracy,
    consistency_blended,
    local_share,
    majority_match,
)
from jaxrl_llm.advantages.decoupled import decoupled_normalized
from jaxrl_llm.advantages.effective_rank import (
    effective_rank,
    rank_bonus,
    rank_dynamics,
    rank_shaped,
)
from jaxrl_llm.advantages.entropy_steering import (
    entropy_mixed_advantages,
    steered_advantages,
    steered_batch,
    steering_temperature,
    temperature_controller,
)
from jaxrl_llm.advantages.filters import sigma_filtered
from jaxrl_llm.advantages.gae import (
    discounted_returns,
    gae,
    gae_returns,
    generalized_advantages,
    kl_penalized_rewards,
    outcome_token_rewards,
    reinforce_plus_plus,
)
from jaxrl_llm.advantages.group_relative import group_normalized, leave_one_out, length_weighted_baseline
from jaxrl_llm.advantages.groups import (
    group_leader,
    group_max,
    group_mean,
    group_min,
    group_rank,
    group_size,
    group_std,
    group_sum,
    present,
)
from jaxrl_llm.advantages.knapsack import (
    knapsack_rollouts,
    mixed_probability,
    rollout_value,
    rollouts_for_signal,
)
from jaxrl_llm.advantages.length import solved_group_length_penalty
from jaxrl_llm.advantages.pass_at_k import max_at_k_weights, pass_at_k_normalized, top_margin
from jaxrl_llm.advantages.preferences import score_win_rate, win_rate
from jaxrl_llm.advantages.rehearsal import near_perfect_groups
from jaxrl_llm.advantages.risk import mixed_value_at_risk, tracked_mixed_value_at_risk
from jaxrl_llm.advantages.selection import nonconstant_groups
from jaxrl_llm.advantages.sharpening import novelty_sharpened
from jaxrl_llm.advantages.shifted_baselines import log_mean_exp_baseline, shifted_mean_baseline
from jaxrl_llm.advantages.signed import nonzero_advantages, signed_correctness
from jaxrl_llm.advantages.subsets import (
    balanced_groups,
    best_and_random,
    extreme_rewards,
    extreme_samples,
    one_success_one_failure,
    resampled,
    squared_correlation,
)
from jaxrl_llm.advantages.turns import turn_leave_one_out, turn_mixed_normalized
from jaxrl_llm.advantages.twin_critic import twin_baseline_normalized
from jaxrl_llm.advantages.whitening import moments, reinforce_plus_plus_baseline, token_weights, whitened

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
    "score_win_rate",
    "shifted_mean_baseline",
    "sigma_filtered",
    "signed_correctness",
    "solved_group_length_penalty",
    "squared_correlation",
    "steered_advantages",
    "steered_batch",
    "steering_temperature",
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
