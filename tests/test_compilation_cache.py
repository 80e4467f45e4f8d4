"""Compiled programs are kept between starts, where nobody says otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import pytest

import jaxrl_llm
from jaxrl_llm import compilation_cache
from jaxrl_llm.compilation_cache import (
    compilation_cache_directory,
    compilation_cache_report,
    enable_compilation_cache,
    remove_parts,
)

ROOT = Path(jaxrl_llm.__file__).parents[1]
VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAXRL_COMPILATION_CACHE", "XDG_CACHE_HOME")


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """Nothing is said of a cache, and a home that is empty."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_the_directory_is_that_of_the_user_and_of_this_kind_of_machine(unset, tmp_path):
    ours = compilation_cache_directory()
    assert ours.parent == tmp_path / ".cache" / "jaxrl_llm" / "compilation"
    unset.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compilation_cache_directory() == tmp_path / "xdg" / "jaxrl_llm" / "compilation" / ours.name
    unset.setattr(compilation_cache.platform, "machine", lambda: "another")
    assert compilation_cache_directory().name != ours.name


@pytest.mark.parametrize("said", ["0", "off", "False"])
def test_it_can_be_switched_off(unset, said):
    unset.setenv("JAXRL_COMPILATION_CACHE", said)
    assert compilation_cache_directory() is None
    assert compilation_cache_report() == {"directory": f"off (JAXRL_COMPILATION_CACHE={said})"}


def test_jaxs_own_variable_wins(unset, tmp_path):
    unset.setenv("JAXRL_COMPILATION_CACHE", "0")
    unset.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "told"))
    assert compilation_cache_directory() == tmp_path / "told"


def test_what_jax_was_told_before_stays(unset, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before, "conftest.py has set it"
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / ".cache").exists()


def test_a_home_that_cannot_be_written_is_no_error(unset, tmp_path):
    (tmp_path / ".cache").write_text("no directory")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_report_counts_programs(unset, tmp_path):
    unset.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    (tmp_path / "jit_f-123-cache").write_bytes(bytes(2**20))
    (tmp_path / "jit_f-123-atime").write_bytes(b"")
    assert compilation_cache_report() == {"directory": str(tmp_path), "programs": 1, "mebibytes": 1.0}


class Zstandard:
    """Stands for the package of this name: a frame is its magic number and zlib's data."""

    ZstdError = zlib.error
    magic = b"\x28\xb5\x2f\xfd"

    class ZstdDecompressor:
        def decompressobj(self):
            return Reader()

    @classmethod
    def compressed(cls, data: bytes) -> bytes:
        return cls.magic + zlib.compress(data)[2:]


class Reader:
    """zlib's reader behind a magic number."""

    def __init__(self):
        self.reader, self.left = zlib.decompressobj(), len(Zstandard.magic)
        self.reader.decompress(b"\x78\x9c")

    @property
    def eof(self):
        return self.reader.eof

    def decompress(self, data: bytes) -> bytes:
        data, self.left = data[self.left :], max(self.left - len(data), 0)
        return self.reader.decompress(data)


@pytest.mark.parametrize("installed", [True, False])
def test_parts_of_programs_are_deleted_and_nothing_else_is(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(compilation_cache, "_zstandard", lambda: Zstandard if installed else None)
    monkeypatch.setattr(compilation_cache, "_BYTES", 100)
    whole = [zlib.compress(os.urandom(300)), Zstandard.compressed(os.urandom(300)), b"compressed in an unknown way"]
    known = range(1 + installed)
    lengths = {(0, 0), *((number, length) for number in known for length in range(1, len(whole[number])))}
    for number, program in enumerate(whole):
        (tmp_path / f"whole{number}-cache").write_bytes(program)
    for number, length in lengths:
        (tmp_path / f"part{number}-{length}-cache").write_bytes(whole[number][:length])
    (tmp_path / "part-atime").write_bytes(b"")
    assert len(remove_parts(tmp_path)) == len(lengths)
    mark = ".checked-zstandard" if installed else ".checked"
    assert {path.name for path in tmp_path.iterdir()} == {mark, "part-atime", *(f"whole{n}-cache" for n in range(3))}


def test_what_was_looked_at_is_not_read_again(tmp_path):
    old, new = tmp_path / "old-cache", tmp_path / "new-cache"
    old.write_bytes(zlib.compress(b"program"))
    assert remove_parts(tmp_path) == []
    for path, seconds in ((old, -60.0), (new, 0.0)):
        path.write_bytes(b"\x78")
        os.utime(path, (time.time() + seconds,) * 2)
    assert remove_parts(tmp_path) == ["new-cache"]


@pytest.mark.slow
def test_the_next_start_reads_what_the_last_one_compiled_and_replaces_half_a_program(micro_yaml, tmp_path):
    """Processes of `jaxrl explain`, and what each compiled."""
    code = (
        "import json, sys\n"
        "from jaxrl_llm import cli\n"
        "from jaxrl_llm.run.compilation import CompilationWatch\n"
        "with CompilationWatch() as watch:\n"
        "    assert cli.main(['explain', sys.argv[1], '--json']) == 0\n"
        "print(json.dumps([watch.count, watch.read]), file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = []
    for start in range(4):
        programs = list(tmp_path.glob("jaxrl_llm/compilation/*/*-cache"))
        if start == 2:  # a kill has left a part of the largest
            half = max(programs, key=lambda path: path.stat().st_size)
            half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
        done = subprocess.run(
            [sys.executable, "-c", code, str(micro_yaml)], cwd=ROOT, env=environment, capture_output=True, check=True
        )
        found.append(json.loads(done.stderr.splitlines()[-1]))
    compiled = found[0][0]
    assert compiled > 0
    assert found == [[compiled, 0], [0, compiled], [1, compiled - 1], [0, compiled]]
