"""Parameters in the sharding and dtype of sampling."""

from __future__ import annotations

from jaxtyping import PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.placement import constrained_like


def weights_for_decoding(model: Model, params: PyTree) -> PyTree:
    """Parameters in the sharding of the current rules, in the compute dtype.

    With rules that do not split `embed` (`parallel.rules.decoding`) they are gathered once, not for each token.
    """
    # Adapters and int8 matrices keep their dtypes: they are small, or are scaled in float32.
    dtype = getattr(model.config, "compute_dtype", None) if model.trained is None else None
    return constrained_like(model.specs, params, dtype)
