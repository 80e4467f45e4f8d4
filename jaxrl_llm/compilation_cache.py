"""The persistent cache of compiled programs: later starts read the programs that an earlier one compiled.

`JAX_COMPILATION_CACHE_DIR` names another directory; `JAXRL_COMPILATION_CACHE=0` switches the cache off.

jax writes cache files in place and never replaces an existing one, with or without `jax_compilation_cache_max_size`: a
killed process leaves a truncated file, which every later start would fail to read and recompile. Each start deletes
such files.
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
_ZLIB, _ZSTANDARD = b"\x78", b"\x28\xb5\x2f\xfd"  # magic bytes of the compressions that jax uses
_BYTES = 1 << 16  # decompressed at a time


def enable_compilation_cache() -> None:
    """Cache programs that take half a second or longer to compile. Must be called before the first compilation.

    jax's setting is kept if it has a directory already, or if ours is not writable. Truncated files are deleted in
    either directory.
    """
    import jax

    directory = compilation_cache_directory()
    if told := jax.config.values["jax_compilation_cache_dir"]:
        _remove_parts_once(told)
        return
    if directory is None:
        return
    try:
        # Anyone who can write here can make this process execute code.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        _remove_parts_once(str(directory))


def remove_parts(directory: Path) -> list[str]:
    """Delete truncated cache files, and return their names.

    Only files written since the last call are read. A file that another process is just writing may be deleted too;
    that process continues with its compiled program.
    """
    # Who has no package for a compression leaves those programs to those who read them.
    name = _CHECKED if _zstandard() is None else f"{_CHECKED}-zstandard"
    mark, started = directory / name, directory / f"{name}.{os.getpid()}"
    since = mark.stat().st_mtime_ns if mark.exists() else 0
    started.touch()  # takes the time from the file system's clock
    removed = []
    for file in directory.glob(_PROGRAMS):
        with contextlib.suppress(FileNotFoundError):  # deleted by another start
            if file.stat().st_mtime_ns >= since and not _whole(file.read_bytes()):
                file.unlink()
                removed.append(file.name)
    started.replace(mark)
    return removed


@functools.cache
def _remove_parts_once(directory: str) -> None:
    if "://" not in directory:  # objects in storage are never truncated
        with contextlib.suppress(OSError):
            remove_parts(Path(directory))


def _whole(program: bytes) -> bool:
    """Whether compressed data is complete; True for a compression that cannot be read here."""
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
    """The package zstandard, which jax uses for compression if it is installed; None without it."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


def compilation_cache_directory() -> Path | None:
    """The cache directory: jax's setting, else a folder for this kind of machine; None if the cache is off."""
    if told := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(told)
    if os.environ.get("JAXRL_COMPILATION_CACHE", "").lower() in _OFF:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jaxrl_llm" / "compilation" / _machine()


def compilation_cache_report() -> dict[str, Any]:
    """The directory, the number of programs, and their size."""
    directory = compilation_cache_directory()
    if directory is None:
        return {"directory": f"off (JAXRL_COMPILATION_CACHE={os.environ['JAXRL_COMPILATION_CACHE']})"}
    files = [file.stat().st_size for file in directory.glob(_PROGRAMS)] if directory.is_dir() else []
    return {"directory": str(directory), "programs": len(files), "mebibytes": round(sum(files) / 2**20, 1)}


def _machine() -> str:
    """A name shared by machines that can run each other's programs.

    CPU programs use the instruction set of the compiling machine, which jax's key does not include, and different
    machines may share a home directory.
    """
    described = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described += [next((line for line in lines if line.lower().startswith(name)), "") for name in ("flags", "features")]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
