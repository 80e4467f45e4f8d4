"""The start of a run on one or several hosts: identification of processes, roll call, then jax's runtime.

A single process needs none of this. Several processes are identified by their launcher (TPU, GKE, Slurm, Open MPI), as
in jax, or by flags.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxrl_llm.bounds import natural
from jaxrl_llm.parallel.peers import Peers, Place
from jaxrl_llm.parallel.roll_call import call_roll

# Packages that affect the numbers of a process, or its part of a checkpoint.
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes")
# Variables set by launchers of several processes, whether or not jax recognises them.
_LAUNCHED = (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))


def place_of_this_process(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, seconds: float = 600.0
) -> Place | None:
    """The place of this process among the processes of a run; None for a single process.

    Args:
      coordinator: host:port of process 0; missing numbers are then taken from the launcher's variables.
      processes: number of processes.
      process: number of this process.
      seconds: time limit for resolving the coordinator's name.

    Raises:
      ValueError: for incomplete flags, or a launcher that jax does not recognise.
    """
    launched = next((names for names in _LAUNCHED if set(names) <= set(os.environ)), None)
    counted = None if launched is None else tuple(int(os.environ[name]) for name in launched)
    if coordinator is not None and processes is None and process is None and counted is not None:
        processes, process = counted
    if (coordinator, processes, process) != (None, None, None):
        return _flagged(coordinator, processes, process)
    found = _recognised(seconds)
    if found is None and launched is not None and counted is not None and counted[0] > 1:
        raise ValueError(
            f"{launched[0]} is {counted[0]}, so this is one of several processes, but jax does not recognise their "
            "launcher (Open MPI from version 5 on is one); add --coordinator HOST:PORT"
        )
    return found


def _flagged(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    if processes == 1 and process in (None, 0):
        return None
    if coordinator is None or processes is None or process is None:
        given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process}
        there = " and ".join(f"{flag} {value}" for flag, value in given.items() if value is not None)
        absent = " and ".join(flag for flag, value in given.items() if value is None)
        raise ValueError(f"{there} came without {absent}; each process needs all three")
    host, _, port = coordinator.rpartition(":")
    if not host or not 0 < (natural(port) or 0) < 65536:
        raise ValueError(f"--coordinator is {coordinator!r}; write it as HOST:PORT, the address of process 0")
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(f"--process-id is {process}, --processes {processes}; they go from 0 to {processes - 1}")
    return Place(coordinator, processes, process)


def _recognised(seconds: float) -> Place | None:
    from jax._src.clusters import ClusterEnv  # the only way to find out what jax.distributed.initialize would detect

    for kind in ClusterEnv._cluster_types:
        # A pod that is not part of an indexed job is one process, and asking Kubernetes about it fails.
        if kind.opt_in_only_method or (kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ):
            continue
        if not kind.is_env_present():
            continue
        name = kind.name or kind.__name__
        try:
            return _described(kind, name, seconds)
        except RuntimeError as error:  # the launcher is present, but incomplete
            raise ValueError(
                f"this process was started by {name}, but jax cannot get the other processes from it ({error}); add "
                "--coordinator HOST:PORT --processes N --process-id I"
            ) from error
    return None


def _described(kind: Any, name: str, seconds: float) -> Place | None:
    processes = kind.get_process_count()
    if processes == 1:
        return None
    coordinator = kind.get_coordinator_address(int(seconds), os.environ.get("JAX_COORDINATOR_PORT"))
    local = kind.get_local_process_id()
    # A single process per host uses all of its devices; jax would give it only the first one.
    if name.endswith("tpu") or _one_process_each_host(processes):
        local = None
    slices = os.environ.get("MEGASCALE_NUM_SLICES")  # a value from before a preemption would make all processes wait
    how = name + (f", MEGASCALE_NUM_SLICES={slices}" if slices else "")
    return Place(coordinator, processes, kind.get_process_id(), how, None if local is None else (local,))


def _one_process_each_host(processes: int) -> bool:
    return (
        os.environ.get("SLURM_STEP_NUM_NODES") == str(processes) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )


def initialise(
    place: Place | None,
    config: Mapping[str, Any],
    *,
    seconds: float = 600.0,
    decide: Callable[[], Mapping[str, Any]] = dict,
    heartbeat_seconds: int = 100,
) -> Peers | None:
    """Start jax's runtime over all processes of a run, after a roll call; no effect for a single process.

    Must be called before jax initialises devices.

    Args:
      place: of this process.
      config: as a tree; it must be equal on all processes, like all other values of `facts`.
      seconds: how long to wait for the others, at the roll call and again in jax.
      decide: called on process 0; its result is `decided` of every process's `Peers`.
      heartbeat_seconds: time after which jax itself treats a silent process as lost.

    Returns:
      The open connections to the others, to be closed with `Peers.leave` at the end; None for a single process.

    Raises:
      Disagreement: if versions or configs differ.
      ProcessLost: if some processes did not connect.
    """
    if place is None:
        return None
    import jax

    peers = call_roll(place, facts(config), seconds=seconds, decide=decide)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",  # jax would otherwise select devices that were not requested
        initialization_timeout=max(60, int(seconds)),
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    return peers


def facts(config: Mapping[str, Any]) -> dict[str, str]:
    """Values that must be equal on all processes of a run: source, versions, and each key of the config.

    Versions are those of Python, jax, jaxlib, libtpu, flax, optax, orbax, numpy and ml_dtypes; "not installed" is one.
    """
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    package = Path(__file__).parents[1]
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return {"jaxrl_llm's source": source.hexdigest()[:12]} | versions | dict(_flat(config, ""))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _flat(tree: Any, prefix: str):
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(tree, default=str, sort_keys=True)
