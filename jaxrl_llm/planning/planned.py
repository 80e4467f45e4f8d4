"""What is known of a config without the machine that it is planned for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax

from jaxrl_llm.config import Config, MeshConfig
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.auto import automatic_sizes
from jaxrl_llm.parallel.backend import planned_for
from jaxrl_llm.parallel.mesh import axis_product_error
from jaxrl_llm.planning.estimate import Estimate, estimate
from jaxrl_llm.planning.topologies import Topology
from jaxrl_llm.run.explain import abstract_inputs
from jaxrl_llm.run.machine import Target, demand
from jaxrl_llm.run.setup import Parts, parts


@dataclass(frozen=True)
class Planned:
    """What is known of a config without a machine.

    Attributes:
      config: of the run.
      machine: it is planned for.
      parts: of the config, composed for one device.
      state: as shapes.
    """

    config: Config
    machine: Topology
    parts: Parts
    state: Any

    @property
    def model(self) -> Model:
        """The policy."""
        return self.parts.model

    def estimated(self, sizes: Mapping[str, int], config: Config | None = None) -> Estimate:
        """Memory and work on a mesh of these sizes."""
        c = self.parts.step.composition
        return estimate(config or self.config, self.model, c, self.state, sizes, self.machine)


def planned(config: Config, machine: Topology) -> Planned:
    """What a config asks for, before there are devices.

    Raises:
      ValueError: for a config that cannot be composed, or a model that does not describe its parameters.
    """
    with planned_for(machine.chip.platform):
        plain = replace(config, mesh=MeshConfig(), training=replace(config.training, offload=()))
        built = parts(plain, Target(jax.local_devices(backend="cpu")[:1], int(machine.chip.bytes)))
        if built.model.specs is None:
            raise ValueError("the model has no specs, so that nothing is known of its parameters; give it some to plan")
        state, _ = abstract_inputs(built)
    return Planned(config, machine, built, state)


def mesh_sizes(plan: Planned) -> tuple[dict[str, int], str]:
    """(sizes of the mesh axes, why): those of the config, or what `mesh: auto` takes on the machine.

    Raises:
      ValueError: for sizes that do not multiply to the number of devices.
    """
    config, machine = plan.config, plan.machine
    count = config.mesh.devices or machine.devices
    if count > machine.devices:
        raise ValueError(f"mesh.devices is {count}, but {machine.name} has {machine.devices}; choose at most that")
    if config.mesh.sizes:
        if (problem := axis_product_error(config.mesh.sizes, count)) is not None:
            raise ValueError(problem)
        return {axis: size for axis, size in config.mesh.sizes.items() if size > 1}, "as the config says"
    devices = [SimpleNamespace(slice_index=number // machine.devices_in_slice) for number in range(count)]
    needed = demand(config, plan.model)
    return automatic_sizes(devices, needed, device_bytes=int(machine.chip.bytes))


def written_mesh(sizes: Mapping[str, int]) -> str:
    """Sizes as section mesh of a config has them."""
    fields = {("slices" if axis == "slice" else axis): size for axis, size in sizes.items()}
    return "{" + ", ".join(f"{axis}: {size}" for axis, size in fields.items()) + "}"
