"""Advantages: rewards -> one number a row or a token that says how much better than expected it was.

Each is a pure function whose positional parameters are named after fields of `Experience`.
"""

from jaxrl_llm.advantages.baselines import raw_rewards, reward_minus_baseline, running_mean_baseline
from jaxrl_llm.advantages.confidence import confidence_shaped
from jaxrl_llm.advantages.decoupled import decoupled_normalized
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
from jaxrl_llm.advantages.length import solved_group_length_penalty
from jaxrl_llm.advantages.pass_at_k import max_at_k_weights, pass_at_k_normalized, top_margin
from jaxrl_llm.advantages.rehearsal import near_perfect_groups
from jaxrl_llm.advantages.risk import mixed_value_at_risk, tracked_mixed_value_at_risk
from jaxrl_llm.advantages.selection import nonconstant_groups
from jaxrl_llm.advantages.turns import turn_mixed_normalized
from jaxrl_llm.advantages.twin_critic import twin_baseline_normalized
from jaxrl_llm.advantages.whitening import moments, reinforce_plus_plus_baseline, token_weights, whitened

__all__ = [
    "confidence_shaped",
    "decoupled_normalized",
    "discounted_returns",
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
    "leave_one_out",
    "length_weighted_baseline",
    "max_at_k_weights",
    "mixed_value_at_risk",
    "moments",
    "near_perfect_groups",
    "nonconstant_groups",
    "outcome_token_rewards",
    "pass_at_k_normalized",
    "present",
    "raw_rewards",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reward_minus_baseline",
    "running_mean_baseline",
    "sigma_filtered",
    "solved_group_length_penalty",
    "token_weights",
    "top_margin",
    "tracked_mixed_value_at_risk",
    "turn_mixed_normalized",
    "twin_baseline_normalized",
    "whitened",
]
