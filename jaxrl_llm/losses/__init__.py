"""Losses: log-probabilities, entropies and values -> a sum and a count.

Each is a pure function whose positional parameters are named after what the step provides; each returns a
`jaxrl_llm.experience.Loss`.
"""

from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.correction import importance_weight, negative_sequence_mask
from jaxrl_llm.losses.divergences import divergence, divergence_reward, js_definition, kl_estimate
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.generators import GENERATORS, Generator, generator, renyi
from jaxrl_llm.losses.policy import cispo, clipped_surrogate, policy_gradient, sapo
from jaxrl_llm.losses.sequence_policy import sequence_clipped_surrogate
from jaxrl_llm.losses.supervised import negative_log_likelihood
from jaxrl_llm.losses.value import clipped_value

__all__ = [
    "GENERATORS",
    "Aggregation",
    "Generator",
    "aggregate",
    "cispo",
    "clipped_surrogate",
    "clipped_value",
    "divergence",
    "divergence_reward",
    "entropy_bonus",
    "generator",
    "importance_weight",
    "js_definition",
    "kl_estimate",
    "negative_log_likelihood",
    "negative_sequence_mask",
    "policy_gradient",
    "renyi",
    "row_weight",
    "sapo",
    "sequence_clipped_surrogate",
]
