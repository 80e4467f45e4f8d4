"""A plan: whether a run fits a machine that need not be there, where its time goes, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax

from jaxrl_llm.config import Config, MeshConfig, as_tree
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.auto import automatic_sizes
from jaxrl_llm.parallel.backend import planned_for
from jaxrl_llm.parallel.mesh import axis_product_error
from jaxrl_llm.parallel.rules import AXES
from jaxrl_llm.planning import ahead
from jaxrl_llm.planning.estimate import Estimate, estimate
from jaxrl_llm.planning.topologies import GIB, Topology, topology
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


def plan(
    config: Config,
    name: str,
    *,
    compile_programs: bool = True,
    search: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Plan a run.

    Args:
      config: of the run; of its model, config.json is enough.
      name: of the topology.
      compile_programs: ahead of time, where there is a compiler for the machine; else everything is estimated.
      search: try mesh layouts first, and plan the best of them.
      report: is given lines on what is going on.

    Returns:
      plain data: topology, mesh, how it was found out, phases, programs, fits, suggestions, layouts, versions.

    Raises:
      ValueError: for a topology that nobody knows, or a config that cannot be composed on it.
    """
    machine = topology(name)
    known = planned(config, machine)
    layouts = ranked_layouts(known) if search else []
    if layouts:
        config = replace(config, mesh=replace(config.mesh, **_fields(layouts[0]["mesh"], config.mesh)))
        known = replace(known, config=config)
    sizes, reason = mesh_sizes(known)
    reason = "the best of the search" if layouts else reason
    guess = known.estimated(sizes)
    result: dict[str, Any] = {
        "config": config.name,
        "topology": name,
        "machine": machine.described(),
        "devices": machine.devices,
        "device_bytes": machine.chip.bytes,
        "rates": {key: getattr(machine.chip, key) for key in ("flops", "bandwidth", "link")},
        "mesh": sizes,
        "mesh_reason": reason,
        "versions": ahead.versions(),
        "layouts": layouts,
    }
    why_not = ahead.can_compile(machine) if compile_programs else "asked for without compiling: an estimate from sizes"
    measured = None
    if why_not is None:
        try:
            measured = ahead.compiled(as_tree(config), name, report=report)
        except ahead.CannotCompile as error:
            why_not = f"{error}; what follows is an estimate from sizes"
    result |= {"method": "estimated" if measured is None else "compiled", "note": why_not or ""}
    result |= _from_estimate(guess, machine) if measured is None else _from_compiler(measured, machine)
    result["estimate"] = {
        phase: {"memory_bytes": sum(held.values()), "sent_bytes": sum(guess.costs[phase].collectives.values())}
        for phase, held in guess.memory.items()
    }
    result["step_seconds"] = sum(phase["seconds"] for phase in result["phases"])
    result["memory_bytes"] = max(each["memory_bytes"] for each in result["phases"] + result["programs"])
    result["fits"] = result["memory_bytes"] <= machine.chip.bytes and all(p["fits"] for p in result["programs"])
    result["suggestions"] = [] if result["fits"] else suggestions(known, sizes, result["memory_bytes"])
    return result


def refusal(result: Mapping[str, Any]) -> str | None:
    """What to say of a plan that does not fit: the numbers, and a way out."""
    if result["fits"]:
        return None
    needs, has = result["memory_bytes"] / GIB, result["device_bytes"] / GIB
    way = "; or ".join(each["change"] for each in result["suggestions"][:2])
    return (
        f"the plan does not fit: a device of {result['topology']} needs {needs:.2f} GiB and has {has:.2f}; "
        f"{'try ' + way if way else 'take more or larger devices, or a smaller model'}"
    )


def _roofline(phase: str, cost: Mapping[str, Any], machine: Topology) -> dict[str, Any]:
    seconds = {
        "compute": cost["flops"] / machine.chip.flops,
        "memory": cost["bytes"] / machine.chip.bandwidth,
        "network": cost["seconds_on_network"],
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "phase": phase,
        "memory_bytes": cost["memory_bytes"],
        "flops": cost["flops"],
        "bytes": cost["bytes"],
        "collectives": dict(cost["collectives"]),
        "seconds_by": seconds,
        "seconds": seconds[bound],
        "bound": bound,
        "largest": cost.get("largest", []),
    }


def _from_estimate(guess: Estimate, machine: Topology) -> dict[str, Any]:
    phases = []
    for phase, cost in guess.costs.items():
        held = guess.memory[phase]
        largest = [{"bytes": size, "value": name} for name, size in sorted(held.items(), key=lambda pair: -pair[1])]
        known = vars(cost) | {"memory_bytes": sum(held.values()), "largest": largest[:6]}
        phases.append(_roofline(phase, known, machine))
    return {"phases": phases, "programs": []}


def _from_compiler(measured: Mapping[str, Any], machine: Topology) -> dict[str, Any]:
    order = (*ahead.PHASES, "other")
    found = measured["phases"]
    return {
        "mesh": measured["mesh"],
        "phases": [_roofline(phase, found[phase], machine) for phase in order if phase in found],
        "programs": measured["programs"],
        "state_bytes": measured["state_bytes"],
    }


def _fields(sizes: Mapping[str, int], asked: MeshConfig) -> dict[str, Any]:
    """Fields of section mesh that say these sizes."""
    names = {axis: "slices" if axis == "slice" else axis for axis in AXES}
    return {field: sizes.get(axis) for axis, field in names.items()} | {"devices": asked.devices}


def layouts(plan: Planned) -> Iterator[dict[str, int]]:
    """Mesh sizes that multiply to the devices of the machine and divide what they have to."""
    machine, needed = plan.machine, demand(plan.config, plan.model)
    count = (plan.config.mesh.devices or machine.devices) // machine.slices
    for tensor in _divisors(count):
        if needed.heads % tensor:
            continue
        for expert in _divisors(count // tensor) if needed.experts > 1 else [1]:
            if needed.experts % expert:
                continue
            rest = count // tensor // expert
            for sequence in _divisors(rest):
                for data in _divisors(rest // sequence):
                    fsdp = rest // sequence // data
                    sizes = {"slice": machine.slices, "data": data, "fsdp": fsdp}
                    sizes |= {"expert": expert, "sequence": sequence, "tensor": tensor}
                    yield {axis: size for axis, size in sizes.items() if size > 1}


def ranked_layouts(plan: Planned, *, count: int = 12) -> list[dict[str, Any]]:
    """Mesh layouts by what they are estimated to take: those that fit first, the fastest first among them.

    A layout on which devices have rows to spare is not one: its rows divide into whole ones for every device.
    """
    machine, rows = plan.machine, demand(plan.config, plan.model).rows
    found = []
    for sizes in layouts(plan):
        owners = math.prod(sizes.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
        if rows % owners:
            continue
        try:
            guess = plan.estimated(sizes)
        except ValueError:
            continue
        phases = _from_estimate(guess, machine)["phases"]
        found.append(
            {
                "mesh": sizes,
                "memory_bytes": guess.peak,
                "fits": guess.peak <= machine.chip.bytes,
                "seconds": sum(phase["seconds"] for phase in phases),
                "bound": {phase["phase"]: phase["bound"] for phase in phases},
            }
        )
    if not found:
        raise ValueError(
            f"no mesh of {machine.devices} devices gives each of them whole ones of the {rows} sequences of a "
            "microbatch; change training.sequences_per_microbatch or training.prompts_per_step"
        )
    found.sort(key=lambda each: (not each["fits"], each["seconds"] if each["fits"] else each["memory_bytes"]))
    return found[:count]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def suggestions(plan: Planned, sizes: Mapping[str, int], needs: float) -> list[dict[str, Any]]:
    """Changes that would make a plan fit, the smallest first: one alone, or where none is enough, several together.

    Args:
      plan: that does not fit.
      sizes: of its mesh.
      needs: bytes that a device needs; estimates say by how much a change lowers it.
    """
    before, room = plan.estimated(sizes).peak, plan.machine.chip.bytes
    tried = []
    for text, config, changed in _changes(plan.config, plan, sizes):
        after = _needs_after(plan, config, changed, before, needs)
        if after is not None and after < needs:
            tried.append({"change": text, "memory_bytes": after, "fits": after <= room})
    alone = [each for each in tried if each["fits"]]
    if alone:
        return alone
    # Together, in the order in which they cost least.
    config, chosen, texts, least = plan.config, dict(sizes), [], needs
    for _ in range(12):
        better = None
        for text, changed_config, changed in _changes(config, plan, chosen):
            after = _needs_after(plan, changed_config, changed, before, needs)
            if after is not None and after < 0.98 * least:
                better = (text, changed_config, changed, after)
                break
        if better is None:
            break
        text, config, chosen, least = better
        texts.append(text)
        if least <= room:
            return [{"change": " and ".join(texts), "memory_bytes": least, "fits": True}]
    return sorted(tried, key=lambda each: each["memory_bytes"])[:3]


def _needs_after(plan: Planned, config: Config, sizes: Mapping[str, int], before: float, needs: float) -> float | None:
    """Bytes a device needs after a change, by how the estimate changes; None where the change cannot be."""
    try:
        known = plan if config is plan.config else planned(config, plan.machine)
        return max(0.0, needs + known.estimated(sizes).peak - before)
    except ValueError:
        return None


def _changes(config: Config, plan: Planned, sizes: Mapping[str, int]) -> Iterator[tuple[str, Config, dict[str, int]]]:
    """Single changes from the cheapest on: (what to write, the config with it, the mesh with it)."""
    training, rollout = config.training, config.rollout
    now = dict(sizes)

    def trained(**values: Any) -> Config:
        return replace(config, training=replace(training, **values))

    rows = training.sequences_per_microbatch or demand(config, plan.model).rows
    owners = math.prod(now.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
    if rows // 2 >= owners and rows % 2 == 0:
        yield (
            f"training.sequences_per_microbatch={rows // 2}",
            trained(sequences_per_microbatch=rows // 2),
            now,
        )
    if training.remat != "full":
        yield "training.remat=full", trained(remat="full"), now
    slots = rollout.slots or training.prompts_per_step * rollout.samples_per_prompt
    if slots // 2 >= owners and rollout.slots is None:
        yield f"rollout.slots={slots // 2}", replace(config, rollout=replace(rollout, slots=slots // 2)), now
    if now.get("data", 1) > 1:
        moved = {axis: size for axis, size in now.items() if axis != "data"}
        moved["fsdp"] = now.get("fsdp", 1) * now["data"]
        yield f"mesh: {_written(moved)} (more fsdp)", config, moved
    heads = demand(config, plan.model).heads
    for axis in ("fsdp", "data"):
        tensor = 2 * now.get("tensor", 1)
        if now.get(axis, 1) % 2 == 0 and heads % tensor == 0:
            moved = now | {axis: now[axis] // 2, "tensor": tensor}
            moved = {name: size for name, size in moved.items() if size > 1}
            yield f"mesh: {_written(moved)} (more tensor)", config, moved
            break
    if training.moment_dtype is None and training.optimizer in ("adamw", "lion", "muon", "sgd"):
        yield "training.moment_dtype=bfloat16", trained(moment_dtype="bfloat16"), now
    if config.model.parameter_dtype == "float32":
        narrow = replace(config.model, parameter_dtype="bfloat16", compute_dtype="bfloat16")
        rounding = "stochastic" if training.bfloat16_update == "nearest" else training.bfloat16_update
        yield (
            f"model.parameter_dtype=bfloat16 model.compute_dtype=bfloat16 training.bfloat16_update={rounding}",
            replace(config, model=narrow, training=replace(training, bfloat16_update=rounding)),
            now,
        )
    if plan.machine.chip.platform != "cpu" and "optimizer" not in training.offload:
        yield "training.offload=[optimizer]", trained(offload=(*training.offload, "optimizer")), now
    if plan.parts.step.composition.copies_reference and "reference" not in training.offload:
        yield "training.offload=[reference]", trained(offload=(*training.offload, "reference")), now
    if config.mesh.gather_for_rollout:
        yield "mesh.gather_for_rollout=false", replace(config, mesh=replace(config.mesh, gather_for_rollout=False)), now
    if training.optimizer != "adafactor":
        yield "training.optimizer=adafactor", trained(optimizer="adafactor", moment_dtype=None), now


def _written(sizes: Mapping[str, int]) -> str:
    fields = {("slices" if axis == "slice" else axis): size for axis, size in sizes.items()}
    return "{" + ", ".join(f"{axis}: {size}" for axis, size in fields.items()) + "}"


def tables(result: Mapping[str, Any]) -> list[tuple[str, Sequence[dict[str, str]]]]:
    """(title, rows) for people."""
    size = lambda number: f"{number / GIB:.2f} GiB"  # noqa: E731
    phases = [
        {
            "phase": each["phase"],
            "memory": size(each["memory_bytes"]),
            "TFLOP": f"{each['flops'] / 1e12:,.1f}",
            "traffic GB": f"{each['bytes'] / 1e9:,.0f}",
            "sent GB": f"{sum(each['collectives'].values()) / 1e9:,.1f}",
            "of it": ", ".join(
                f"{kind} {sent / 1e9:,.1f}" for kind, sent in sorted(each["collectives"].items()) if sent >= 5e7
            ),
            "seconds": f"{each['seconds']:,.2f}",
            "bound by": each["bound"],
        }
        for each in result["phases"]
    ]
    title = (
        f"{result['config']} on {result['topology']} ({result['machine']}), mesh {_written(result['mesh'])}: "
        f"{result['method']}; of each device, for one step"
    )
    shown: list[tuple[str, Sequence[dict[str, str]]]] = []
    if result["layouts"]:
        shown.append(
            (
                "layouts, by estimates",
                [
                    {
                        "mesh": _written(each["mesh"]),
                        "memory": size(each["memory_bytes"]),
                        "fits": "yes" if each["fits"] else "no",
                        "seconds": f"{each['seconds']:,.1f}",
                        "bound by": ", ".join(f"{phase} {bound}" for phase, bound in each["bound"].items()),
                    }
                    for each in result["layouts"]
                ],
            )
        )
    shown.append((title, phases))
    if result["programs"]:
        shown.append(
            (
                f"programs; a device has {size(result['device_bytes'])}",
                [
                    {
                        "program": each["program"],
                        "memory": size(each["memory_bytes"]),
                        "state": size(each["state_bytes"]),
                        "temporaries": size(each["temporary_bytes"]),
                        "fits": "yes" if each["fits"] else "NO",
                        "compiled in": "refused" if each["refused"] else f"{each['compile_seconds']:.0f} s",
                        "kernels": ", ".join(sorted(each["kernels"])),
                    }
                    for each in result["programs"]
                ],
            )
        )
    fullest = max(result["phases"], key=lambda each: each["memory_bytes"])
    shown.append(
        (
            f"what takes most memory in {fullest['phase']}",
            [
                {
                    "size": size(each["bytes"]),
                    "what": " ".join(filter(None, [each.get("shape", ""), each["value"]])),
                    "from": _short(each.get("from", "")),
                }
                for each in fullest["largest"]
            ],
        )
    )
    if result["suggestions"]:
        shown.append(
            (
                "would make it fit, by estimates" if result["suggestions"][0]["fits"] else "would help",
                [{"change": each["change"], "memory": size(each["memory_bytes"])} for each in result["suggestions"]],
            )
        )
    return [(name, rows) for name, rows in shown if rows]


def _short(origin: str) -> str:
    """The path of an instruction without what every path has in it."""
    left_out = {"while", "body", "closed_call", "checkpoint"}
    return "/".join(part for part in origin.split("/")[1:] if part not in left_out)
