"""Losses: log-probabilities, entropies and values -> a sum and a count.

Each is a pure function whose positional parameters are named after what the step provides; each returns a
`jaxrl_llm.experience.Loss`.
"""

from jaxrl_llm.losses.aggregation import Aggregation, aggregate, row_weight
from jaxrl_llm.losses.correction import importance_weight, negative_sequence_mask
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.policy import cispo, clipped_surrogate, policy_gradient, sapo
from jaxrl_llm.losses.sequence_policy import sequence_clipped_surrogate
from jaxrl_llm.losses.supervised import negative_log_likelihood
from jaxrl_llm.losses.value import clipped_value

__all__ = [
    "Aggregation",
    "aggregate",
    "cispo",
    "clipped_surrogate",
    "clipped_value",
    "entropy_bonus",
    "importance_weight",
    "negative_log_likelihood",
    "negative_sequence_mask",
    "policy_gradient",
    "row_weight",
    "sapo",
    "sequence_clipped_surrogate",
]
