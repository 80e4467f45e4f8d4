"""Devices, versions and memory of this machine, for `jaxrl doctor` and for summaries."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from typing import Any

import psutil

from jaxrl_llm.compilation_cache import compilation_cache_report

PACKAGES = (
    "jaxrl_llm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "array_record",
    "chex",
    "numpy",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the dependencies of a run; "missing" for missing ones."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def memory_in_use() -> dict[str, float]:
    """Memory of this process in GiB: resident memory on the host, and, if devices report it, the current and peak
    memory of the fullest device."""
    import jax

    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    bytes_held: dict[str, int] = {"host_memory_gib": psutil.Process().memory_info().rss}
    for name, key in (("device_memory_gib", "bytes_in_use"), ("device_peak_memory_gib", "peak_bytes_in_use")):
        if known := [one[key] for one in stats if key in one]:
            bytes_held[name] = max(known)
    return {name: held / 2**30 for name, held in bytes_held.items()}


def peak_memory() -> int:
    """Bytes of host memory that this process has held at most; Linux counts kibibytes, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine_report() -> dict[str, dict[str, Any]]:
    """Devices, host, cached compiled programs, and versions as plain data."""
    import jax

    devices = {}
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        devices[str(device)] = device.device_kind + (f", {limit / 2**30:.1f} GiB" if limit else "")
    memory = psutil.virtual_memory()
    return {
        "devices": {"backend": jax.default_backend(), "processes": jax.process_count(), **devices},
        "host": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory.total / 2**30, 1),
            "memory_free_gib": round(memory.available / 2**30, 1),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        },
        "compiled programs": compilation_cache_report(),
        "versions": package_versions(),
    }
