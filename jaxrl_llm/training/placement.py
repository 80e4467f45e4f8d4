"""Where the state of a step is: shardings over a mesh, and what is kept in the memory of the host."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import TrainState
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import RULES, Rules
from jaxrl_llm.parallel.shardings import shardings, state_shardings
from jaxrl_llm.training.networks import POLICY

# What can be kept in the memory of the host between its uses: names for a config.
OFFLOADABLE = ("optimizer", "reference")


@dataclass(frozen=True)
class Placement:
    """Devices of a step, and what lies where.

    Attributes:
      mesh: the devices; None leaves placement to jax.
      rules: from the names of axes to those of the mesh.
      gather_for_rollout: with parameters that are sharded over `fsdp`, gather them once a rollout; else once a token.
      offload: what is kept in the host's memory between its uses, of `OFFLOADABLE`. Needs a mesh.
    """

    mesh: Mesh | None = None
    rules: Rules = field(default_factory=lambda: RULES)
    gather_for_rollout: bool = True
    offload: frozenset[str] = frozenset()


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
    models: Mapping[str, Model], state: PyTree, mesh: Mesh, rules: Rules = RULES, *, offload: Collection[str] = ()
) -> PyTree:
    """A sharding for each array of a training state.

    Args:
      models: of the networks by name; a network that is not named has the policy's.
      state: arrays or their shapes.
      mesh: the devices.
      rules: the table.
      offload: of `OFFLOADABLE`.
    """
    tables = {}
    for name, model in models.items():
        tables[name] = (jax.eval_shape(model.init, jax.random.key(0)), parameter_shardings(model, mesh, rules))

    def placed_like(name: str, tree: PyTree) -> PyTree:
        params, lies = tables.get(name, tables[POLICY])
        return state_shardings(tree, params, lies, mesh)

    placed = placed_like(POLICY, state)
    networks = {name: placed_like(name, network) for name, network in state.networks.items()}
    host = lambda path, s: s.with_memory_kind("pinned_host") if is_offloaded(path, offload) else s  # noqa: E731
    return jax.tree_util.tree_map_with_path(host, replace(placed, networks=networks))


def is_offloaded(path: Any, offload: Collection[str]) -> bool:
    """Whether an array of a training state is among what these names of `OFFLOADABLE` mean."""
    names = tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path[:3])
    meant = {"optimizer": ("networks", POLICY, "optimizer_state"), "reference": ("networks", "reference", "params")}
    return names in [meant[name] for name in offload]


def in_device_memory(state: TrainState, placed: TrainState | None, offload: Collection[str]) -> TrainState:
    """Inside a program: the state with these parts, where they are kept in the host's memory, on their devices."""
    if placed is None or not offload:
        return state

    def used(path: Any, x: Array, s: NamedSharding) -> Array:
        return jax.device_put(x, s.with_memory_kind("device")) if is_offloaded(path, offload) else x

    return jax.tree_util.tree_map_with_path(used, state, placed)


def put_back(state: TrainState, placed: TrainState | None) -> TrainState:
    """Inside a program: the state where it is kept between steps."""
    if placed is None:
        return state

    def put(x: Array, s: NamedSharding) -> Array:
        return jax.device_put(x, s) if s.memory_kind == "pinned_host" else jax.lax.with_sharding_constraint(x, s)

    return jax.tree.map(put, state, placed)


def abstract_like(tree: PyTree, placed: PyTree) -> PyTree:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)
