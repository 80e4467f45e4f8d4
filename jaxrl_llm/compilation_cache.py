"""Compiled programs are kept between starts: the second start of a command reads what the first one compiled.

`JAX_COMPILATION_CACHE_DIR` names another directory; `JAXRL_COMPILATION_CACHE=0` keeps nothing.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

_OFF = ("0", "false", "off", "no")


def enable_compilation_cache() -> None:
    """Keep programs that take half a second or longer to compile. Must come before the first one is compiled.

    Nothing is changed where jax has a directory already, or where ours cannot be written.
    """
    import jax

    directory = compilation_cache_directory()
    if directory is None or jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        # Whoever can write here decides what this process runs.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compilation_cache_directory() -> Path | None:
    """Where programs are kept: as jax is told, else a folder of this kind of machine; None where that is off."""
    if told := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(told)
    if os.environ.get("JAXRL_COMPILATION_CACHE", "").lower() in _OFF:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jaxrl_llm" / "compilation" / _machine()


def compilation_cache_report() -> dict[str, Any]:
    """The directory, how many programs lie there, and how much they take."""
    directory = compilation_cache_directory()
    if directory is None:
        return {"directory": f"off (JAXRL_COMPILATION_CACHE={os.environ['JAXRL_COMPILATION_CACHE']})"}
    files = [file.stat().st_size for file in directory.glob("*-cache")] if directory.is_dir() else []
    return {"directory": str(directory), "programs": len(files), "mebibytes": round(sum(files) / 2**20, 1)}


def _machine() -> str:
    """A name for machines that run each other's programs.

    Programs for a CPU use the instructions of the one that compiled them, which jax's key leaves out; and a home may
    be shared by machines that differ.
    """
    described = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described += [next((line for line in lines if line.lower().startswith(name)), "") for name in ("flags", "features")]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
