"""Policy, reference and value networks: pure functions over parameter pytrees."""

from jaxrl_llm.models.logprobs import (
    TokenStatistics,
    entropy_of,
    positions_per_chunk,
    scaled_log_softmax,
    token_statistics,
)
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import ParameterSpec, abstract, initialise, logical_axes, parameter_count
from jaxrl_llm.models.transformer import TransformerConfig, forward, transformer

__all__ = [
    "Model",
    "ParameterSpec",
    "TokenStatistics",
    "TransformerConfig",
    "abstract",
    "entropy_of",
    "forward",
    "initialise",
    "logical_axes",
    "parameter_count",
    "positions_per_chunk",
    "scaled_log_softmax",
    "token_statistics",
    "transformer",
]
