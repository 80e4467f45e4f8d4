"""Advantages: rewards -> one number a row or a token that says how much better than expected it was.

Each is a pure function whose positional parameters are named after fields of `Experience`.
"""

from jaxrl_llm.advantages.baselines import raw_rewards, reward_minus_baseline, running_mean_baseline
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
from jaxrl_llm.advantages.pass_at_k import max_at_k_weights, pass_at_k_normalized, top_margin
from jaxrl_llm.advantages.selection import nonconstant_groups
from jaxrl_llm.advantages.whitening import moments, reinforce_plus_plus_baseline, token_weights, whitened

__all__ = [
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
    "moments",
    "nonconstant_groups",
    "outcome_token_rewards",
    "pass_at_k_normalized",
    "present",
    "raw_rewards",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reward_minus_baseline",
    "running_mean_baseline",
    "token_weights",
    "top_margin",
    "whitened",
]
