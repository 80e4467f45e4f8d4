"""Losses: log-probabilities, entropies and values -> a sum and a count.

Each is a pure function whose positional parameters are named after what the step provides; each returns a
`jaxrl_llm.experience.Loss`.
"""

from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.anchors import annealed_share, convex_kl, mixed_policy_surrogate
from jaxrl_llm.losses.blended import blended_surrogate
from jaxrl_llm.losses.controllers import adaptive_kl, entropy_gated_kl
from jaxrl_llm.losses.correction import importance_weight, negative_sequence_mask
from jaxrl_llm.losses.discriminative import decoupled_reward, group_trust_region
from jaxrl_llm.losses.divergences import divergence
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.entropy_history import entropy_history, entropy_history_penalty, two_phase_decay
from jaxrl_llm.losses.estimates import divergence_reward, js_definition, kl_estimate
from jaxrl_llm.losses.external import external_surrogate, rehearsal_divergence, stored_likelihood
from jaxrl_llm.losses.forking_tokens import entropy_band, forking_kl, forking_tokens
from jaxrl_llm.losses.generators import GENERATORS, Generator, generator, renyi
from jaxrl_llm.losses.huber import huber_value, twin_huber_value
from jaxrl_llm.losses.low_probability import lowest_token_proxy, min_p_logprobs, protected_surrogate
from jaxrl_llm.losses.mixing import adaptive_mixing, gradient_alignment, mixing_weight
from jaxrl_llm.losses.negative_aware import negative_aware_likelihood
from jaxrl_llm.losses.off_policy import masked_policy_gradient
from jaxrl_llm.losses.outcome import (
    failure_pushback,
    outcome_token_weight,
    success_cloning,
    token_reward_cross_entropy,
)
from jaxrl_llm.losses.pairwise import kl_penalized_sequence_rewards, pairwise_surrogate
from jaxrl_llm.losses.policy import cispo, clipped_surrogate, policy_gradient, sapo
from jaxrl_llm.losses.routing import router_balance
from jaxrl_llm.losses.sequence_policy import sequence_clipped_surrogate
from jaxrl_llm.losses.supervised import negative_log_likelihood
from jaxrl_llm.losses.token_weights import entropy_change_weights
from jaxrl_llm.losses.valuation import random_policy_valuation
from jaxrl_llm.losses.value import clipped_value

__all__ = [
    "GENERATORS",
    "Aggregation",
    "Generator",
    "adaptive_kl",
    "adaptive_mixing",
    "aggregate",
    "annealed_share",
    "blended_surrogate",
    "cispo",
    "clipped_surrogate",
    "clipped_value",
    "convex_kl",
    "decoupled_reward",
    "divergence",
    "divergence_reward",
    "entropy_band",
    "entropy_bonus",
    "entropy_change_weights",
    "entropy_gated_kl",
    "entropy_history",
    "entropy_history_penalty",
    "external_surrogate",
    "failure_pushback",
    "forking_kl",
    "forking_tokens",
    "generator",
    "gradient_alignment",
    "group_trust_region",
    "huber_value",
    "importance_weight",
    "js_definition",
    "kl_estimate",
    "kl_penalized_sequence_rewards",
    "lowest_token_proxy",
    "masked_policy_gradient",
    "min_p_logprobs",
    "mixed_policy_surrogate",
    "mixing_weight",
    "negative_aware_likelihood",
    "negative_log_likelihood",
    "negative_sequence_mask",
    "outcome_token_weight",
    "pairwise_surrogate",
    "policy_gradient",
    "protected_surrogate",
    "random_policy_valuation",
    "rehearsal_divergence",
    "renyi",
    "router_balance",
    "row_weight",
    "sapo",
    "sequence_clipped_surrogate",
    "stored_likelihood",
    "success_cloning",
    "token_reward_cross_entropy",
    "twin_huber_value",
    "two_phase_decay",
]
