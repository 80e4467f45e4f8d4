"""The mesh of a run: from its config, or chosen from the machine and the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm.config import Config
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import ParameterSpec, parameter_count
from jaxrl_llm.parallel import automatic_sizes, changed_rules, kept_whole, make_mesh
from jaxrl_llm.parallel.auto import Demand
from jaxrl_llm.training.networks import trainable_part


class Target(NamedTuple):
    """The machine of a plan.

    Attributes:
      devices: device descriptions of a compiler.
      device_bytes: memory of each.
    """

    devices: Sequence[Any]
    device_bytes: int


def chosen_mesh(config: Config, model: Model, target: Target | None = None) -> tuple[Mesh | None, str]:
    """(mesh, reason for its sizes). A single device has no mesh, unless arrays are offloaded to host memory.

    Args:
      config: of the run.
      model: the policy.
      target: another machine; there a single device also has a mesh.

    Raises:
      ValueError: for sizes that do not multiply to the number of devices.
    """
    asked = config.mesh
    chosen = asked.devices if target is None else target.devices[: asked.devices]
    if asked.sizes:
        there = jax.devices() if chosen is None else chosen
        sizes, reason = (asked.sizes, "as the config says") if isinstance(there, int) else on_slices(asked.sizes, there)
        mesh = make_mesh(chosen, sizes)
    else:
        devices = list(make_mesh(chosen).devices.flat)
        memory = None if target is None else target.device_bytes
        sizes, reason = automatic_sizes(devices, demand(config, model), device_bytes=memory)
        mesh = make_mesh(chosen, sizes)
    without = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if without and target is None:
        raise ValueError(
            f"the mesh takes {mesh.size} of {len(jax.devices())} devices, and none of process "
            f"{', '.join(map(str, sorted(without)))} of {jax.process_count()}; leave mesh.devices out, or start fewer "
            "processes"
        )
    if mesh.size == 1 and not config.training.offload and target is None:
        return None, "there is one"
    if model.specs is not None and (whole := kept_whole(model.specs, mesh, changed_rules(asked.rules))):
        reason += "; not divided and kept whole: " + ", ".join(f"{name} {size}" for name, size in whole.items())
    return mesh, reason


def on_slices(sizes: Mapping[str, int], devices: Sequence[Any]) -> tuple[Mapping[str, int], str]:
    """(sizes, reason): the sizes of the config, with fewer slices if fewer complete slices exist.

    Slices are replicas, so a run can continue with fewer; each device then has more rows.
    """
    wanted, there = sizes.get("slice", 1), len({getattr(device, "slice_index", 0) for device in devices})
    if there < wanted and math.prod(sizes.values()) // wanted * there == len(devices):
        return {**sizes, "slice": there}, f"as in the config, on the {there} existing of its {wanted} slices"
    return sizes, "as the config says"


def demand(config: Config, model: Model) -> Demand:
    """Estimated memory demand of a run, before anything is allocated."""
    training = config.training
    rows = training.prompts_per_step * config.rollout.samples_per_prompt // training.minibatches_per_epoch
    rows = training.sequences_per_microbatch or rows
    if model.specs is None:
        return Demand(0, 0, rows=rows)
    leaves = jax.tree.leaves(model.specs, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))
    stored = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    learns = parameter_count(trainable_part(model, model.specs))
    computed = jnp.dtype(getattr(model.config, "compute_dtype", "float32")).itemsize
    sized = [pair for leaf in leaves for pair in zip(leaf.axes, leaf.shape, strict=True)]
    split = [size for name, size in sized if name in ("kv_heads", "mlp")]
    experts = getattr(model.config, "experts", None)
    # Two moments, the gradient, and possibly a copy for the reference.
    return Demand(
        state_bytes=stored + 16 * learns,
        weight_bytes=parameter_count(model.specs) * computed,
        heads=math.gcd(*split) if split else 1,
        experts=1 if experts is None else experts.count,
        rows=rows,
    )
