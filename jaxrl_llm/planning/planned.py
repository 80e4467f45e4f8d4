"""The machine-independent part of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jaxrl_llm.config import Config, MeshConfig
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.auto import automatic_sizes
from jaxrl_llm.parallel.backend import planned_for
from jaxrl_llm.parallel.mesh import axis_product_error, placed_devices
from jaxrl_llm.planning.estimate import Estimate, estimate
from jaxrl_llm.planning.topologies import Topology
from jaxrl_llm.run.checkpoints import written_networks
from jaxrl_llm.run.explain import abstract_inputs, state_bytes
from jaxrl_llm.run.machine import Target, demand
from jaxrl_llm.run.setup import Parts, parts
from jaxrl_llm.run.staged import earlier_stages, last_stage
from jaxrl_llm.training.networks import POLICY


@dataclass(frozen=True)
class Planned:
    """The machine-independent part of a plan.

    Attributes:
      config: of the run.
      machine: the machine of the plan.
      parts: of the config, composed for one device.
      state: as shapes.
      earlier: the stages before the last one, by name.
    """

    config: Config
    machine: Topology
    parts: Parts
    state: Any
    earlier: Mapping[str, Planned] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The policy."""
        return self.parts.model

    def estimated(self, sizes: Mapping[str, int], config: Config | None = None) -> Estimate:
        """Memory and work on a mesh of these sizes; of earlier stages their memory."""
        c, config = self.parts.step.composition, config or self.config
        if c.rollout is None and c.written is not None:  # rows are padded, not packed
            rollout, training = replace(config.rollout, samples_per_prompt=1), config.training
            training = replace(training, prompts_per_step=c.written.rows)
            config = replace(config, rollout=rollout, training=training)
        with planned_for(self.machine.chip.platform):
            found = estimate(config, self.model, c, self.state, sizes, self.machine)
        for name, one in self.earlier.items():
            before = one.estimated(sizes)
            found.memory |= {f"{name}: {phase}": before.memory[phase] for phase in before.costs}
        return found

    @property
    def written_bytes(self) -> int:
        """Bytes of a checkpoint."""
        networks = written_networks(self.parts, self.state)
        if (trained := self.model.trained) is not None:
            policy = networks[POLICY]
            networks[POLICY] = replace(policy, params=trained.split(policy.params)[0])
        return state_bytes(replace(self.state, networks=networks))


def planned(config: Config, machine: Topology) -> Planned:
    """Compose a config for planning, without devices.

    Raises:
      ValueError: for a config that cannot be composed, or a model without parameter specs.
    """

    def one(config: Config, like: Parts | None = None, **more: Any) -> Planned:
        plain = replace(config, mesh=MeshConfig(), training=replace(config.training, offload=()))
        built = parts(plain, Target(jax.local_devices(backend="cpu")[:1], int(machine.chip.bytes)), like)
        if built.model.specs is None:
            raise ValueError(
                "the model has no specs, so the sizes of its parameters are unknown; add specs for planning"
            )
        return Planned(config, machine, built, abstract_inputs(built)[0], **more)

    with planned_for(machine.chip.platform):
        last = one(last_stage(config))
        return replace(last, earlier={name: one(stage, last.parts) for name, stage in earlier_stages(config)})


def mesh_sizes(plan: Planned) -> tuple[dict[str, int], str]:
    """(sizes of the mesh axes, reason): those of the config, or the choice of `mesh: auto` for the machine.

    Raises:
      ValueError: for sizes that do not multiply to the number of devices, or that the machine cannot place.
    """
    config, machine = plan.config, plan.machine
    count = config.mesh.devices or machine.devices
    if count > machine.devices:
        raise ValueError(f"mesh.devices is {count}, but {machine.name} has {machine.devices}; choose at most that")
    if config.mesh.sizes:
        if (problem := axis_product_error(config.mesh.sizes, count)) is not None:
            raise ValueError(problem)
        require_place(plan, config.mesh.sizes)
        return {axis: size for axis, size in config.mesh.sizes.items() if size > 1}, "as the config says"
    devices = machine.described_devices()[:count]
    sizes, reason = automatic_sizes(devices, demand(config, plan.model), device_bytes=int(machine.chip.bytes))
    require_place(plan, sizes)
    return sizes, reason


def require_place(plan: Planned, sizes: Mapping[str, int]) -> None:
    """Raise ValueError if the devices of a TPU cannot form a mesh of these sizes."""
    if plan.machine.chip.platform == "tpu":
        placed_devices(plan.machine.described_devices()[: plan.config.mesh.devices], sizes)


def written_mesh(sizes: Mapping[str, int]) -> str:
    """Sizes in the form of section mesh of a config."""
    fields = {("slices" if axis == "slice" else axis): size for axis, size in sizes.items()}
    return "{" + ", ".join(f"{axis}: {size}" for axis, size in fields.items()) + "}"
