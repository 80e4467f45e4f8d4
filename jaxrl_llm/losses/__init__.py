"""Losses: from log-probabilities, entropies and values to a numerator and a denominator.

Each is a pure function whose positional parameters are named after fields that the step provides; each returns a
`jaxrl_llm.experience.Loss`.
"""

from __future__ import annotations

from jaxrl_llm.experience import Loss
from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.divergences.convex import convex_kl
from jaxrl_llm.losses.divergences.distillation import skewed_divergence, teacher_reverse_kl
from jaxrl_llm.losses.divergences.divergence import divergence
from jaxrl_llm.losses.divergences.dual_head import (
    aligned_gradients,
    binary_logit_divergence,
    dual_head_distillation,
)
from jaxrl_llm.losses.divergences.estimates import divergence_reward, js_definition, kl_estimate
from jaxrl_llm.losses.divergences.generators import GENERATORS, Generator, generator, renyi
from jaxrl_llm.losses.policy.blended import blended_surrogate
from jaxrl_llm.losses.policy.low_probability import lowest_token_proxy, min_p_logprobs, protected_surrogate
from jaxrl_llm.losses.policy.mixed_policies import mixed_policy_surrogate
from jaxrl_llm.losses.policy.off_policy import masked_policy_gradient
from jaxrl_llm.losses.policy.outcome import (
    failure_pushback,
    outcome_token_weight,
    success_cloning,
    token_reward_cross_entropy,
)
from jaxrl_llm.losses.policy.sequence_surrogates import sequence_clipped_surrogate
from jaxrl_llm.losses.policy.surrogates import cispo, clipped_surrogate, policy_gradient, sapo
from jaxrl_llm.losses.policy.valuation import mean_log_ratio, random_policy_valuation
from jaxrl_llm.losses.preference.bradley_terry import bradley_terry, gaussian_bradley_terry
from jaxrl_llm.losses.preference.discriminative import decoupled_reward, group_trust_region
from jaxrl_llm.losses.preference.dpo import dpo
from jaxrl_llm.losses.preference.goal_contrast import goal_contrast, goal_quality
from jaxrl_llm.losses.preference.kto import kto, mismatched_completions, mismatched_kl
from jaxrl_llm.losses.preference.opponents import (
    beside_itself,
    beside_partner,
    demonstrated,
    exploratory_preference,
    followed_by,
    gap_relations,
    regret_preference,
    same_prompt,
)
from jaxrl_llm.losses.preference.pairwise import kl_penalized_sequence_rewards, pairwise_surrogate
from jaxrl_llm.losses.preference.reference_free import odds_ratio, simpo
from jaxrl_llm.losses.preference.reward_model_losses import (
    outcome_cross_entropy,
    ranked_answers,
    rating_regression,
    verdict_ranking,
    weak_labels,
)
from jaxrl_llm.losses.preference.self_play import dno, inpo, nash_md, optimal_transport, token_guided
from jaxrl_llm.losses.preference.shifted_policies import embeddings_of_all, score_spread, sentence_contrast
from jaxrl_llm.losses.preference.single_answers import (
    anchored_preference,
    binary_classifier,
    log_collision_probability,
    off_policy_weight,
    preferred_likelihood,
    running_shift,
    sample_log_ratio,
)
from jaxrl_llm.losses.preference.token_divergence import sequential_divergence_preference
from jaxrl_llm.losses.ratio import log_ratio, on_mask, pessimistic_surrogate, token_share
from jaxrl_llm.losses.regularisers.entropy import entropy_bonus
from jaxrl_llm.losses.regularisers.entropy_history import entropy_history, entropy_history_penalty
from jaxrl_llm.losses.regularisers.routing import router_balance
from jaxrl_llm.losses.supervised.likelihood import negative_log_likelihood
from jaxrl_llm.losses.supervised.negative_aware import negative_aware_likelihood
from jaxrl_llm.losses.supervised.reference_answers import answer_likelihood_gradient, weighted_answer_likelihood
from jaxrl_llm.losses.supervised.scored_text import (
    advantage_weighted_likelihood,
    reward_weighted_likelihood,
    unlikelihood,
)
from jaxrl_llm.losses.supervised.written_tokens import external_surrogate, rehearsal_divergence, stored_likelihood
from jaxrl_llm.losses.token_weights.correction import importance_weight, negative_sequence_mask
from jaxrl_llm.losses.token_weights.entropy_change import entropy_change_weights, predicted_entropy_change
from jaxrl_llm.losses.token_weights.forking_tokens import entropy_band, forking_kl, forking_mask, forking_tokens
from jaxrl_llm.losses.token_weights.masked_parts import answer_part, demonstrated_part, over_mask, rewarded_part
from jaxrl_llm.losses.value.clipped_value import clipped_value
from jaxrl_llm.losses.value.distributional import (
    categorical_value,
    expectile_value,
    quantile_value,
    several_values,
)
from jaxrl_llm.losses.value.huber import huber_value, twin_huber_value
from jaxrl_llm.losses.value.step_models import return_decomposition, step_label_likelihood

__all__ = [
    "GENERATORS",
    "Aggregation",
    "Generator",
    "Loss",
    "advantage_weighted_likelihood",
    "aggregate",
    "aligned_gradients",
    "anchored_preference",
    "answer_likelihood_gradient",
    "answer_part",
    "beside_itself",
    "beside_partner",
    "binary_classifier",
    "binary_logit_divergence",
    "blended_surrogate",
    "bradley_terry",
    "categorical_value",
    "cispo",
    "clipped_surrogate",
    "clipped_value",
    "convex_kl",
    "decoupled_reward",
    "demonstrated",
    "demonstrated_part",
    "divergence",
    "divergence_reward",
    "dno",
    "dpo",
    "dual_head_distillation",
    "embeddings_of_all",
    "entropy_band",
    "entropy_bonus",
    "entropy_change_weights",
    "entropy_history",
    "entropy_history_penalty",
    "expectile_value",
    "exploratory_preference",
    "external_surrogate",
    "failure_pushback",
    "followed_by",
    "forking_kl",
    "forking_mask",
    "forking_tokens",
    "gap_relations",
    "gaussian_bradley_terry",
    "generator",
    "goal_contrast",
    "goal_quality",
    "group_trust_region",
    "huber_value",
    "importance_weight",
    "inpo",
    "js_definition",
    "kl_estimate",
    "kl_penalized_sequence_rewards",
    "kto",
    "log_collision_probability",
    "log_ratio",
    "lowest_token_proxy",
    "masked_policy_gradient",
    "mean_log_ratio",
    "min_p_logprobs",
    "mismatched_completions",
    "mismatched_kl",
    "mixed_policy_surrogate",
    "nash_md",
    "negative_aware_likelihood",
    "negative_log_likelihood",
    "negative_sequence_mask",
    "odds_ratio",
    "off_policy_weight",
    "on_mask",
    "optimal_transport",
    "outcome_cross_entropy",
    "outcome_token_weight",
    "over_mask",
    "pairwise_surrogate",
    "pessimistic_surrogate",
    "policy_gradient",
    "predicted_entropy_change",
    "preferred_likelihood",
    "protected_surrogate",
    "quantile_value",
    "random_policy_valuation",
    "ranked_answers",
    "rating_regression",
    "regret_preference",
    "rehearsal_divergence",
    "renyi",
    "return_decomposition",
    "reward_weighted_likelihood",
    "rewarded_part",
    "router_balance",
    "row_weight",
    "running_shift",
    "same_prompt",
    "sample_log_ratio",
    "sapo",
    "score_spread",
    "sentence_contrast",
    "sequence_clipped_surrogate",
    "sequential_divergence_preference",
    "several_values",
    "simpo",
    "skewed_divergence",
    "step_label_likelihood",
    "stored_likelihood",
    "success_cloning",
    "teacher_reverse_kl",
    "token_guided",
    "token_reward_cross_entropy",
    "token_share",
    "twin_huber_value",
    "unlikelihood",
    "verdict_ranking",
    "weak_labels",
    "weighted_answer_likelihood",
]
