"""Advantages: from rewards, one number per row or token, above 0 where the result is better than expected.

Each is a pure function whose positional parameters are named after fields of `Experience`.
"""

from __future__ import annotations

from jaxrl_llm.advantages.group_relative.agreement import (
    answer_entropy,
    batch_normalized_accuracy,
    consistency_blended,
    local_share,
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
from jaxrl_llm.advantages.group_relative.jensen_bound import jensen_bound
from jaxrl_llm.advantages.group_relative.pool_centred import pool_centred
from jaxrl_llm.advantages.group_relative.return_functionals import return_functional
from jaxrl_llm.advantages.group_relative.risk import group_quantile, mixed_value_at_risk, tracked_mixed_value_at_risk
from jaxrl_llm.advantages.group_relative.shifted_baselines import (
    amplified_gains,
    log_mean_exp_baseline,
    shifted_mean_baseline,
)
from jaxrl_llm.advantages.group_relative.solved_groups import solved_group_length_penalty
from jaxrl_llm.advantages.group_relative.win_rates import score_win_rate, win_rate
from jaxrl_llm.advantages.process.continuations import step_value_gains, tree_advantages
from jaxrl_llm.advantages.process.latent_rewards import latent_rewards
from jaxrl_llm.advantages.process.step_credit import (
    information_gain,
    judged_thoughts,
    merged_transitions,
    min_form_advantages,
    min_form_returns,
)
from jaxrl_llm.advantages.process.turn_credit import (
    outcome_and_turn_centred,
    taken_turns,
    turn_leave_one_out,
    turn_mixed_normalized,
)
from jaxrl_llm.advantages.process.turn_values import running_stock, turn_advantages
from jaxrl_llm.advantages.reinforce.baselines import raw_rewards, reward_minus_baseline, running_mean_baseline
from jaxrl_llm.advantages.reinforce.filters import sigma_filtered
from jaxrl_llm.advantages.reinforce.signed import one_sided, signed_correctness
from jaxrl_llm.advantages.reinforce.whitening import reinforce_plus_plus_baseline, whitened
from jaxrl_llm.advantages.shaping.confidence import confidence_shaped, low_probability_confidence
from jaxrl_llm.advantages.shaping.effective_rank import effective_rank, rank_bonus, rank_dynamics, rank_shaped
from jaxrl_llm.advantages.shaping.entropy_steering import entropy_mixed_advantages, steered_advantages
from jaxrl_llm.advantages.shaping.sharpening import novelty_sharpened
from jaxrl_llm.advantages.shaping.solve_rate import solve_rate_weighted
from jaxrl_llm.advantages.value_based.gae import (
    discounted_returns,
    gae,
    gae_returns,
    generalized_advantages,
    kl_penalized_rewards,
    outcome_token_rewards,
    reinforce_plus_plus,
)
from jaxrl_llm.advantages.value_based.learned_rewards import implicit_token_rewards, missing_end_penalty
from jaxrl_llm.advantages.value_based.several_critics import (
    bin_mean,
    critic_per_reward,
    critic_quantile,
    quantile_mean,
    reach_aware,
)
from jaxrl_llm.advantages.value_based.twin_critic import soft_minimum, twin_baseline_normalized
from jaxrl_llm.experience import Method

__all__ = [
    "Method",
    "amplified_gains",
    "answer_entropy",
    "batch_normalized_accuracy",
    "beta_normalized",
    "beta_normalized_components",
    "bin_mean",
    "budget_advantages",
    "budget_rewards",
    "confidence_shaped",
    "consistency_blended",
    "critic_per_reward",
    "critic_quantile",
    "decoupled_normalized",
    "discounted_returns",
    "effective_rank",
    "entropy_mixed_advantages",
    "gae",
    "gae_returns",
    "generalized_advantages",
    "group_normalized",
    "group_quantile",
    "implicit_token_rewards",
    "information_gain",
    "jensen_bound",
    "judged_thoughts",
    "kl_penalized_rewards",
    "latent_rewards",
    "leave_one_out",
    "length_weighted_baseline",
    "local_share",
    "log_mean_exp_baseline",
    "low_probability_confidence",
    "max_at_k_weights",
    "merged_transitions",
    "min_form_advantages",
    "min_form_returns",
    "missing_end_penalty",
    "mixed_value_at_risk",
    "novelty_sharpened",
    "one_sided",
    "outcome_and_turn_centred",
    "outcome_token_rewards",
    "pass_at_k_normalized",
    "pool_centred",
    "quantile_mean",
    "rank_bonus",
    "rank_dynamics",
    "rank_shaped",
    "raw_rewards",
    "reach_aware",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "return_functional",
    "reward_minus_baseline",
    "running_mean_baseline",
    "running_stock",
    "sample_budgets",
    "score_win_rate",
    "shifted_mean_baseline",
    "sigma_filtered",
    "signed_correctness",
    "soft_minimum",
    "solve_rate_weighted",
    "solved_group_length_penalty",
    "steered_advantages",
    "step_value_gains",
    "taken_turns",
    "top_margin",
    "tracked_mixed_value_at_risk",
    "tree_advantages",
    "turn_advantages",
    "turn_leave_one_out",
    "turn_mixed_normalized",
    "twin_baseline_normalized",
    "whitened",
    "win_rate",
]
