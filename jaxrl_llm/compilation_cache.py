"""Compiled programs are kept between starts: the second start of a command reads what the first one compiled.

`JAX_COMPILATION_CACHE_DIR` names another directory; `JAXRL_COMPILATION_CACHE=0` keeps nothing.

jax writes a program in place and never again what is there, with or without `jax_compilation_cache_max_size`: a process
that is killed leaves a part, which every later start would fail to read and compile anew. A start deletes such parts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import platform
import zlib
from pathlib import Path
from typing import Any

_OFF = ("0", "false", "off", "no")
_PROGRAMS, _CHECKED = "*-cache", ".checked"
_ZLIB, _ZSTANDARD = b"\x78", b"\x28\xb5\x2f\xfd"  # what jax compresses programs with
_BYTES = 1 << 16  # of a program that are decompressed at a time


def enable_compilation_cache() -> None:
    """Keep programs that take half a second or longer to compile. Must come before the first one is compiled.

    Nothing is changed where jax has a directory already, or where ours cannot be written; parts of programs that a kill
    has left are deleted in either.
    """
    import jax

    directory = compilation_cache_directory()
    if told := jax.config.values["jax_compilation_cache_dir"]:
        _remove_parts_once(told)
        return
    if directory is None:
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
        _remove_parts_once(str(directory))


def remove_parts(directory: Path) -> list[str]:
    """Delete programs that were not written to their end, and return their names.

    Only those that were written since the last call are read. One that another process is writing at this moment may be
    among them: that process goes on with what it has compiled.
    """
    # Who has no package for a compression leaves those programs to those who read them.
    name = _CHECKED if _zstandard() is None else f"{_CHECKED}-zstandard"
    mark, started = directory / name, directory / f"{name}.{os.getpid()}"
    since = mark.stat().st_mtime_ns if mark.exists() else 0
    started.touch()  # the time is that of the file system
    removed = []
    for file in directory.glob(_PROGRAMS):
        with contextlib.suppress(FileNotFoundError):  # another start deletes it, too
            if file.stat().st_mtime_ns >= since and not _whole(file.read_bytes()):
                file.unlink()
                removed.append(file.name)
    started.replace(mark)
    return removed


@functools.cache
def _remove_parts_once(directory: str) -> None:
    if "://" not in directory:  # objects of storage are there whole or not at all
        with contextlib.suppress(OSError):
            remove_parts(Path(directory))


def _whole(program: bytes) -> bool:
    """Whether compressed data goes to its end; True as well where it is compressed in a way that is not read here."""
    if program.startswith(_ZLIB):
        reader, wrong = zlib.decompressobj(), zlib.error
    elif program.startswith(_ZSTANDARD) and (zstandard := _zstandard()) is not None:
        reader, wrong = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    else:
        return len(program) >= len(_ZSTANDARD)
    try:
        for start in range(0, len(program), _BYTES):
            if not reader.eof:
                reader.decompress(program[start : start + _BYTES])
    except wrong:
        return False
    return reader.eof


@functools.cache
def _zstandard() -> Any:
    """The package with which jax compresses programs where it is installed, and which reads them; None without."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


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
    files = [file.stat().st_size for file in directory.glob(_PROGRAMS)] if directory.is_dir() else []
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
