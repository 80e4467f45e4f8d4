"""Parameters as sampling reads them."""

from __future__ import annotations

from jaxtyping import PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.placement import constrained_like


def weights_for_decoding(model: Model, params: PyTree) -> PyTree:
    """Parameters where the ambient table puts them, in the dtype that products are computed in.

    With a table that keeps `embed` whole (`parallel.rules.decoding`) they are moved once, and not for each token.
    """
    # Adapters and int8 matrices are small, or are scaled in float32: they keep their dtypes.
    dtype = getattr(model.config, "compute_dtype", None) if model.trained is None else None
    return constrained_like(model.specs, params, dtype)
