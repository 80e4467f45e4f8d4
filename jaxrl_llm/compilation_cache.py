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
import os
import platform
import zlib
from pathlib import Path
from typing import Any

_OFF = ("0", "false", "off", "no")
_PROGRAMS, _CHECKED = "*-cache", ".checked"
_ZLIB, _ZSTANDARD = b"\x78", b"\x28\xb5\x2f\xfd"  # magic bytes of the compressions that jax uses
_BYTES = 1 << 24  # decompressed at a time


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
    mark, started = directory / _CHECKED, directory / f"{_CHECKED}.{os.getpid()}"
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
    """Whether compressed data is complete; True for an unknown compression."""
    if program.startswith(_ZSTANDARD):
        return _whole_zstandard(program)
    if not program.startswith(_ZLIB):
        return len(program) >= len(_ZSTANDARD)
    reader = zlib.decompressobj()
    try:
        while program and not reader.eof:
            reader.decompress(program, _BYTES)
            program = reader.unconsumed_tail
    except zlib.error:
        return False
    return reader.eof


def _whole_zstandard(program: bytes) -> bool:
    """Whether the blocks of a Zstandard frame, by the sizes in their headers, end where the data ends.

    Reference: Zstandard compression (RFC 8878), section 3.1.1. Certainty: recalled.
    """
    described = program[4] if len(program) > 4 else 0
    one_segment, checksum = described >> 5 & 1, described >> 2 & 1
    at = 5 + (not one_segment) + (0, 1, 2, 4)[described & 3] + (one_segment, 2, 4, 8)[described >> 6]
    last = 0
    while not last and at + 3 <= len(program):
        header = int.from_bytes(program[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)  # kind 1 is one byte, repeated
    return bool(last) and at + 4 * checksum == len(program)


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
