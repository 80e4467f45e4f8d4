"""Ahead-of-time compilation of the programs of a step for another machine, in a separate process.

The process runs on a CPU and passes descriptions of the machine's devices to the compiler. The compiler for TPUs is
libtpu, from the package of that name or from TPU_LIBRARY_PATH; virtual CPU devices need nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrl_llm.planning.topologies import Topology, topology

PHASES = ("prefill", "decode", "reference", "update")
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "jaxrl_llm")


class CannotCompile(ValueError):
    """The programs could not be compiled for the machine; the message says why."""


def libtpu_path() -> Path | None:
    """The TPU compiler of this machine, if it has one."""
    if given := os.environ.get("TPU_LIBRARY_PATH"):
        return Path(given) if Path(given).is_file() else None
    spec = importlib.util.find_spec("libtpu")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for place in places if (path := Path(place) / "libtpu.so").is_file()), None)


def can_compile(machine: Topology) -> str | None:
    """None if programs can be compiled for the machine here, else the reason and the remedy."""
    if machine.chip.platform == "cpu":
        return None
    if machine.chip.platform == "gpu":
        return "there is no compiler for GPUs without a GPU, so this is an estimate from sizes"
    if libtpu_path() is None:
        return (
            "libtpu is not installed, so that this is an estimate from sizes; for what the compiler says, install the "
            f"version that jax asks for: pip install {libtpu_requirement()!r} (or set TPU_LIBRARY_PATH)"
        )
    return None


def libtpu_requirement() -> str:
    """The libtpu requirement of the installed jax."""
    for line in importlib.metadata.requires("jax") or ():
        if found := re.match(r"libtpu\s*([^;\s]*)\s*;\s*extra == .tpu.", line):
            return f"libtpu{found[1]}"
    return "jax[tpu]"


def versions() -> dict[str, str]:
    """Versions of the packages that affect compilation."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    library = libtpu_path()
    if library is not None and "libtpu" not in found:
        beside = sorted(library.parent.parent.glob("libtpu-*.dist-info"))
        found["libtpu"] = beside[-1].name.split("-")[1].removesuffix(".dist") if beside else "unknown"
    return found


def compiled(tree: dict[str, Any], name: str, *, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Compile the programs of a step for a machine; see `_measured` for what is returned.

    Args:
      tree: the config as plain data.
      name: of the topology.
      report: called with a line for every program.

    Raises:
      CannotCompile: with the compiler's message.
    """
    machine = topology(name)
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        request = {"tree": tree, "topology": name, "answer": str(answer), "scratch": scratch}
        worker = subprocess.Popen(
            [sys.executable, "-m", "jaxrl_llm.planning.ahead"],
            env=compiler_environment(machine),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = _conversation(worker, json.dumps(request), report)
        if worker.returncode or not answer.is_file():
            lines = [line for line in said.strip().splitlines() if line.strip()]
            fatal = [line for line in lines if re.match(r"F\d{4} ", line) or "Error" in line]
            why = (fatal or lines or ["the process ended without a message"])[-1]
            raise CannotCompile(f"compiling for {name} failed (status {worker.returncode}): {why}")
        result = json.loads(answer.read_text())
    if "error" in result:
        raise CannotCompile(result["error"])
    return result


def compiler_environment(machine: Topology) -> dict[str, str]:
    """Environment of a process that compiles for a machine."""
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    # Only the number of devices is set: other XLA flags of this process could interfere.
    environment.pop("XLA_FLAGS", None)
    if machine.chip.platform == "cpu":
        # XLA's promotion of bfloat16 sums fails for sums of a shard_map over some of the axes.
        flags = (
            f"--xla_force_host_platform_device_count={machine.devices} --xla_disable_hlo_passes=all-reduce-promotion"
        )
        return environment | {"XLA_FLAGS": flags}
    # Nothing is executed on a TPU, so several processes may load the library, also beside a training process.
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3"}
    return environment | {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_LIBRARY_PATH": str(libtpu_path())}


def _conversation(worker: subprocess.Popen, request: str, report: Callable[[str], None]) -> str:
    """Send the request, pass on the reports, and return the output on stderr."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    stderr: list[str] = []
    reader = threading.Thread(target=lambda: stderr.extend(worker.stderr or ()), daemon=True)
    reader.start()
    try:
        worker.stdin.write(request)
        worker.stdin.close()
        for line in worker.stdout:
            report(line.rstrip())
        worker.wait()
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    reader.join(timeout=5)
    return "".join(stderr)


def main() -> None:
    """Main function of the process: reads a request from stdin, and writes the answer to the file that it names."""
    request = json.load(sys.stdin)
    try:
        result = _measured(request["tree"], request["topology"], Path(request["scratch"]))
    except ValueError as error:
        result = {"error": str(error)}
    Path(request["answer"]).write_text(json.dumps(result))


def _measured(tree: dict[str, Any], name: str, scratch: Path) -> dict[str, Any]:
    """The programs of a run, compiled: those of a step of its last stage, the evaluation, those of earlier stages.

    Returns:
      mesh: sizes of its axes. mesh_reason: why. state_bytes: of the state on a device.
      programs: name, memory, what takes it, seconds to compile, kernels, whether it fits.
      phases: of a step: flops, bytes, collectives, seconds_on_network, memory and its largest buffers.
    """

    from jaxrl_llm.config import parse_config
    from jaxrl_llm.parallel.backend import planned_for
    from jaxrl_llm.run.explain import evaluation_program, programs_with_inputs
    from jaxrl_llm.run.machine import Target
    from jaxrl_llm.run.setup import parts
    from jaxrl_llm.run.staged import earlier_stages, last_stage

    machine, config = topology(name), parse_config(tree)
    devices = described_devices(machine)
    target, last = Target(devices, int(machine.chip.bytes)), last_stage(config)
    with planned_for(machine.chip.platform):
        built = parts(last, target)
        mesh = built.step.composition.resources.placement.mesh
        assert mesh is not None
        programs = programs_with_inputs(built)
        held = _bytes_on_device(programs[0].inputs[0])
        result: dict[str, Any] = {
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "mesh_reason": built.mesh_reason,
            "state_bytes": held,
            "programs": [],
            "phases": {},
        }
        evaluation = evaluation_program(built, machine.chip.bytes)
        queue = [(result, last, built, held, one) for one in programs]
        # These programs are not part of a step, so their phases are not kept.
        others: dict[str, Any] = {"programs": result["programs"], "phases": {}}
        queue += [] if evaluation is None else [(others, last, built, held, evaluation)]
        for stage, one in earlier_stages(config):
            before = parts(one, target, like=built)
            for program in programs_with_inputs(before):
                state = _bytes_on_device(program.inputs[0])
                queue.append((others, one, before, state, program._replace(name=f"{stage}: {program.name}")))
        for into, of, made, state, (label, program, given) in queue:
            c = made.step.composition
            print(f"compiling {label} for {machine.described()}", flush=True)
            directory = scratch / re.sub(r"\W", "_", label)
            with kernels_for(devices[0]):
                lowered = program.lower(*given)
            compiled_one = _compiled(lowered, directory, machine)
            steps = _decode_steps(of, 1 if c.rollout is None else c.plan.most_rounds)
            _add_program(into, label, compiled_one, directory, machine, state, steps)
            print(f"compiled {label} in {result['programs'][-1]['compile_seconds']:.0f} s", flush=True)
    return result


def described_devices(machine: Topology) -> Sequence[Any]:
    """The compiler's descriptions of the machine's devices."""
    import jax

    if machine.chip.platform == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.compiler_name, **machine.compiler_options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise CannotCompile(
            f"topology {machine.name!r} is not one that libtpu knows: {str(error).splitlines()[0]}; use an "
            "existing shape, such as those of the accelerator types"
        ) from error
    return sorted(found, key=lambda device: (getattr(device, "slice_index", None) or 0, device.id))


@contextmanager
def kernels_for(device: Any) -> Iterator[None]:
    """A context in which kernels are lowered for this device instead of the process's own."""
    import jax

    cores = getattr(device, "num_cores", None)
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform=device.platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        yield


def _decode_steps(config: Any, rounds: int) -> dict[str, Sequence[int]]:
    """Iterations of a phase's data-dependent loops, in order, if no row ends early."""
    from jaxrl_llm.rollout.decoding import cache_stages

    rollout = config.rollout
    rows = config.training.prompts_per_step * rollout.samples_per_prompt
    *before, last = cache_stages(rollout.max_completion_tokens)
    stages = (*before, last - 1)
    if rollout.slots:
        stages = (math.ceil(rows / rollout.slots) * sum(stages),)
    return {"decode": stages, "other": (rounds,)}


def _compiled(lowered: Any, directory: Path, machine: Topology) -> dict[str, Any]:
    """Text, memory and seconds of a compiled program; if it does not fit, the memory demand reported by the
    compiler."""
    import jax

    directory.mkdir(parents=True, exist_ok=True)
    options = {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}
    started = time.monotonic()
    try:
        executable = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        found = re.search(r"\(([\d.]+)([GMK]?)i?B?\) exceeds available", said) or re.search(
            r"Used ([\d.]+)([GMK]?) of", said
        )
        if "RESOURCE_EXHAUSTED" not in said or found is None:
            raise CannotCompile(f"{machine.chip.platform} compiler: {said.splitlines()[0]}") from error
        size = float(found[1]) * {"G": 2**30, "M": 2**20, "K": 2**10, "": 1}[found[2]]
        texts = sorted(directory.glob("*after_optimizations.txt"))
        text = texts[-1].read_text() if texts else ""
        return {"text": text, "temporary": size, "code": 0, "result": 0, "arguments": 0, "seconds": None}
    memory = executable.memory_analysis()
    return {
        "text": executable.as_text(),
        "temporary": int(memory.temp_size_in_bytes),
        "code": int(memory.generated_code_size_in_bytes),
        "result": int(memory.output_size_in_bytes) - int(memory.alias_size_in_bytes),
        "arguments": int(memory.argument_size_in_bytes),
        "seconds": time.monotonic() - started,
    }


def _add_program(
    result: dict[str, Any],
    label: str,
    one: dict[str, Any],
    directory: Path,
    machine: Topology,
    held: int,
    steps: dict[str, Sequence[int]],
) -> None:
    """Add the analysis of a compiled program to the answer."""
    from jaxrl_llm.parallel import buffers
    from jaxrl_llm.planning import hlo

    program = hlo.Program(one["text"])
    in_slice = machine.devices_in_slice

    def network(groups: Sequence[Sequence[int]]) -> float:
        largest = max(groups, key=len)
        crosses = any(len({device // in_slice for device in group}) > 1 for group in groups[:64])
        return machine.network(max(2, len(largest)), crosses=crosses)

    found, belongs = hlo.costs(program, PHASES, steps=steps, network=network)
    beside = max(held, one["arguments"]) + one["code"] + one["result"]
    kernels: dict[str, float] = {}
    for phase, cost in found.items():
        into = result["phases"].setdefault(
            phase, {"flops": 0.0, "bytes": 0.0, "seconds_on_network": 0.0, "collectives": {}, "memory_bytes": 0}
        )
        for key in ("flops", "bytes", "seconds_on_network"):
            into[key] += getattr(cost, key)
        for kind, size in cost.collectives.items():
            into["collectives"][kind] = into["collectives"].get(kind, 0.0) + size
        for kernel, count in cost.kernels.items():
            kernels[kernel] = kernels.get(kernel, 0.0) + count
    reports = buffers.read_reports(directory)
    origins = {i.name: i.origin for body in program.computations.values() for i in body}
    largest: list[dict[str, Any]] = []
    if reports is not None:
        moments = buffers.peaks(reports, belongs)
        for phase, (size, live) in moments.items():
            if phase in result["phases"]:
                into = result["phases"][phase]
                if beside + size >= into["memory_bytes"]:
                    into |= {"memory_bytes": beside + size, "largest": buffers.as_rows(live, origins)}
        if moments:
            _, live = max(moments.values(), key=lambda moment: moment[0])
            largest = buffers.as_rows(live, origins)
    for phase in found:
        if not result["phases"][phase]["memory_bytes"]:
            result["phases"][phase]["memory_bytes"] = beside + (0 if reports is not None else one["temporary"])
    memory = beside + one["temporary"]
    result["programs"].append(
        {
            "program": label,
            "memory_bytes": memory,
            "state_bytes": held,
            "temporary_bytes": one["temporary"],
            "other_bytes": memory - held - one["temporary"],
            "fits": memory <= machine.chip.bytes and one["seconds"] is not None,
            "compile_seconds": one["seconds"] or 0.0,
            "refused": one["seconds"] is None,
            "kernels": kernels,
            "largest": largest,
        }
    )


def _bytes_on_device(tree: Any) -> int:
    """Bytes of one device's part of sharded arrays, without arrays in host memory."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind == "pinned_host" or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


if __name__ == "__main__":
    main()
