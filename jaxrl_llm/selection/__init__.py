"""Selection: rows and prompts to train on, and the number of samples per prompt.

Each is a pure function whose positional parameters are named after fields of `Experience`; functions that choose rows
return a new `weight`.
"""

from __future__ import annotations

from jaxrl_llm.experience import Method
from jaxrl_llm.selection.adaptive_sampling import balanced_samples, finished_prompts
from jaxrl_llm.selection.allocation import next_rollouts, reward_half_width, rollout_priority
from jaxrl_llm.selection.bandits import bandit
from jaxrl_llm.selection.best_samples import balance_score, best_setting, kept_samples
from jaxrl_llm.selection.curricula import competence, easy_to_hard, growing_difficulty, has_plateaued, stage_slots
from jaxrl_llm.selection.domains import deficit_shares, domain_aware, share_counts
from jaxrl_llm.selection.entropy_tiers import by_entropy
from jaxrl_llm.selection.fresh_pairs import (
    acceptance_probability,
    best_and_worst,
    by_threshold,
    guided_pairs,
    rejection_sampled,
    reward_gap,
)
from jaxrl_llm.selection.informative import nonconstant_groups, nonzero_advantages
from jaxrl_llm.selection.informative_prompts import by_pass_rate, informativeness, kept_by_two_maps, most_variable
from jaxrl_llm.selection.knapsack import knapsack_rollouts, mixed_probability, rollout_value, rollouts_for_signal
from jaxrl_llm.selection.rehearsed import cycled_rows, near_perfect_groups
from jaxrl_llm.selection.spread import drawn_turns, spread_filter
from jaxrl_llm.selection.steered import steered_batch
from jaxrl_llm.selection.subsets import (
    balanced_groups,
    best_and_random,
    complete_samples,
    extreme_rewards,
    extreme_samples,
    finished_in_window,
    one_success_one_failure,
    resampled,
    row_uniforms,
    squared_correlation,
)
from jaxrl_llm.selection.topology import path_value, success_potential, topology_aware, topology_value, turn_keys
from jaxrl_llm.selection.variance_sampling import distinct_pairs, variance_aware

__all__ = [
    "Method",
    "acceptance_probability",
    "balance_score",
    "balanced_groups",
    "balanced_samples",
    "bandit",
    "best_and_random",
    "best_and_worst",
    "best_setting",
    "by_entropy",
    "by_pass_rate",
    "by_threshold",
    "competence",
    "complete_samples",
    "cycled_rows",
    "deficit_shares",
    "distinct_pairs",
    "domain_aware",
    "drawn_turns",
    "easy_to_hard",
    "extreme_rewards",
    "extreme_samples",
    "finished_in_window",
    "finished_prompts",
    "growing_difficulty",
    "guided_pairs",
    "has_plateaued",
    "informativeness",
    "kept_by_two_maps",
    "kept_samples",
    "knapsack_rollouts",
    "mixed_probability",
    "most_variable",
    "near_perfect_groups",
    "next_rollouts",
    "nonconstant_groups",
    "nonzero_advantages",
    "one_success_one_failure",
    "path_value",
    "rejection_sampled",
    "resampled",
    "reward_gap",
    "reward_half_width",
    "rollout_priority",
    "rollout_value",
    "rollouts_for_signal",
    "row_uniforms",
    "share_counts",
    "spread_filter",
    "squared_correlation",
    "stage_slots",
    "steered_batch",
    "success_potential",
    "topology_aware",
    "topology_value",
    "turn_keys",
    "variance_aware",
]
