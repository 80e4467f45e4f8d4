"""Where the state of a step lies: on which devices of a mesh, and in whose memory."""

from __future__ import annotations

from collections.abc import Collection

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import RULES, Rules
from jaxrl_llm.parallel.shardings import shardings, state_shardings

# What can be kept in the memory of the host between its uses: names for a config, and fields of the state.
OFFLOADED = {"optimizer": "optimizer_state", "reference": "reference_params"}


def parameter_shardings(model: Model, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """A sharding for each parameter; whole on every device for a model that does not describe its parameters.

    Raises:
      ValueError: where the mesh does not divide what it has to.
    """
    if model.specs is not None:
        return shardings(model.specs, mesh, rules)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: NamedSharding(mesh, P()), params)


def placed_state(
    model: Model, state: PyTree, mesh: Mesh, rules: Rules = RULES, *, offload: Collection[str] = ()
) -> PyTree:
    """A sharding for each array of a training state.

    Args:
      model: whose state it is.
      state: arrays or their shapes.
      mesh: the devices.
      rules: the table.
      offload: keys of `OFFLOADED`.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    placed = parameter_shardings(model, mesh, rules)
    return state_shardings(state, params, placed, mesh, on_host=[OFFLOADED[name] for name in offload])


def abstract_like(tree: PyTree, placed: PyTree) -> PyTree:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)


def in_device_memory(tree: PyTree, placed: PyTree) -> PyTree:
    """Inside a program: arrays of the host's memory brought to the devices that they belong to."""
    return jax.tree.map(lambda x, s: jax.device_put(x, s.with_memory_kind("device")), tree, placed)
