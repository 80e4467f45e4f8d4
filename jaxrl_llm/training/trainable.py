"""Which part of the policy learns, and what the reference policy is, for models of which all or a part learns.

Where a model has adapters (`Model.trained`), gradients, optimiser state, copies of the policy and checkpoints are of
the adapters alone. The rest is frozen, is in the state once, and is read by policy, reference and critics alike.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import PyTree

from jaxrl_llm.experience import TrainState
from jaxrl_llm.models.model import Model


def trainable_part(model: Model, params: PyTree) -> Any:
    """What learns of a policy's parameters."""
    return params if model.trained is None else model.trained.split(params)[0]


def frozen_part(model: Model, params: PyTree) -> PyTree:
    """What does not; None where all of them learn."""
    return None if model.trained is None else model.trained.split(params)[1]


def whole(model: Model, trainable: PyTree, frozen: PyTree) -> PyTree:
    """The parameters that a model is applied with, from both parts."""
    return trainable if model.trained is None else model.trained.join(trainable, frozen)


def reference_policy(model: Model, state: TrainState) -> PyTree:
    """Parameters of the reference: the copy in the state, or else the policy without its adapters."""
    if model.trained is None:
        return state.reference_params
    if state.reference_params is None:
        return model.trained.reference(state.params)
    return whole(model, state.reference_params, frozen_part(model, state.params))
