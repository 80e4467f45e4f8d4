"""A plan: memory and time of a run on a machine that need not be present, and changes that would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from jaxrl_llm.config import Config, MeshConfig, as_tree
from jaxrl_llm.parallel.rules import AXES
from jaxrl_llm.planning import ahead
from jaxrl_llm.planning.estimate import Estimate
from jaxrl_llm.planning.planned import Planned, mesh_sizes, planned, require_place
from jaxrl_llm.planning.suggestions import suggestions
from jaxrl_llm.planning.topologies import GIB, Topology, topology
from jaxrl_llm.run.machine import demand

STORAGE_BYTES = 1e9  # bytes per second that a host writes to a bucket: a round number


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
      config: of the run; for its model, config.json suffices.
      name: of the topology.
      compile_programs: compile ahead of time if there is a compiler for the machine; otherwise everything is estimated.
      search: try mesh layouts first, and plan the best of them.
      report: called with progress messages.

    Returns:
      Plain data: topology, mesh, method, phases, programs, fits, suggestions, layouts, versions.

    Raises:
      ValueError: for an unknown topology, or a config that cannot be composed on it.
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
    why_not = ahead.can_compile(machine) if compile_programs else "not compiled, as requested: an estimate from sizes"
    measured = None
    if why_not is None:
        try:
            measured = ahead.compiled(as_tree(config), name, report=report)
        except ahead.CannotCompile as error:
            why_not = f"{error}; the following is an estimate from sizes"
    result |= {"method": "estimated" if measured is None else "compiled", "note": why_not or ""}
    result |= _from_estimate(guess, machine) if measured is None else _from_compiler(measured, machine)
    result["estimate"] = {
        phase: {"memory_bytes": sum(guess.memory[phase].values()), "sent_bytes": sum(cost.collectives.values())}
        for phase, cost in guess.costs.items()
    }
    result |= _beside(known, guess, result["phases"])
    result["step_seconds"] = sum(phase["seconds"] for phase in result["phases"])
    result["memory_bytes"] = max(each["memory_bytes"] for each in result["phases"] + result["programs"])
    result["fits"] = result["memory_bytes"] <= machine.chip.bytes and all(p["fits"] for p in result["programs"])
    result["fits"] = result["fits"] and result["host"]["fits"]
    result["suggestions"] = [] if result["fits"] else suggestions(known, sizes, result["memory_bytes"])
    return result


def refusal(result: Mapping[str, Any]) -> str | None:
    """The message for a plan that does not fit, with numbers and a remedy; None if it fits."""
    if result["fits"]:
        return None
    host = result["host"]
    if not host["fits"]:
        return (
            f"the plan does not fit: a host of {result['topology']} needs {host['memory_bytes'] / GIB:.1f} GiB of "
            f"memory of its own and has {host['has_bytes'] / GIB:.1f}; offload less to it (training.offload), or use "
            "more hosts"
        )
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
    state = sum(guess.state.values())
    programs = [
        {
            "program": name,
            "memory_bytes": sum(held.values()),
            "state_bytes": state,
            "temporary_bytes": sum(held.values()) - state,
            "other_bytes": 0.0,
            "fits": sum(held.values()) <= machine.chip.bytes,
            "compile_seconds": None,
            "refused": False,
            "kernels": {},
            "largest": [{"bytes": size, "value": part} for part, size in sorted(held.items(), key=lambda p: -p[1])[:6]],
        }
        for name, held in guess.memory.items()
        if name not in guess.costs
    ]
    return {"phases": phases, "programs": programs}


def _beside(plan: Planned, guess: Estimate, phases: list[dict[str, Any]]) -> dict[str, Any]:
    """Needs of a run besides its devices: checkpoints and host memory; and the time of a token.

    Returns:
      token_seconds: of one decoding step of all completions; None without decoding.
      checkpoint: bytes, bytes per host, and seconds at `STORAGE_BYTES` per second and host.
      host: item -> largest bytes in host memory, their sum, the host's memory (0: unknown), and whether it fits.
    """
    config, machine = plan.config, plan.machine
    hosts = max(1, (config.mesh.devices or machine.devices) // machine.devices_in_host)
    decode = next((phase["seconds"] for phase in phases if phase["phase"] == "decode"), None)
    sequences = config.training.prompts_per_step * config.rollout.samples_per_prompt
    runs = math.ceil(sequences / (config.rollout.slots or sequences))
    written = plan.written_bytes
    parts = {"checkpoint while it is written": written / hosts, "kept there": guess.offloaded * machine.devices_in_host}
    if plan.parts.directory is not None:
        parts["parameters while they are read"] = guess.state.get("parameters", 0.0) * machine.devices_in_host
    total = sum(parts.values())
    return {
        "token_seconds": None if decode is None else decode / runs / max(1, config.rollout.max_completion_tokens - 1),
        "checkpoint": {
            "bytes": written,
            "host_bytes": written / hosts,
            "seconds": written / hosts / STORAGE_BYTES,
            "rate": STORAGE_BYTES,
        },
        "host": {
            "hosts": hosts,
            "memory": {name: size for name, size in parts.items() if size},
            "memory_bytes": total,
            "has_bytes": machine.chip.host_bytes,
            "fits": not machine.chip.host_bytes or total <= machine.chip.host_bytes,
        },
    }


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
    """Keys of section mesh for these sizes."""
    names = {axis: "slices" if axis == "slice" else axis for axis in AXES}
    return {field: sizes.get(axis) for axis, field in names.items()} | {"devices": asked.devices}


def layouts(plan: Planned) -> Iterator[dict[str, int]]:
    """Mesh sizes whose product is the number of devices and that divide the axes that they must divide."""
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
    """Mesh layouts ranked by estimates: fitting ones first, then by speed.

    Only layouts with whole rows on every device are considered.
    """
    machine, rows = plan.machine, demand(plan.config, plan.model).rows
    found = []
    for sizes in layouts(plan):
        owners = math.prod(sizes.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
        if rows % owners:
            continue
        try:
            require_place(plan, sizes)
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
