"""Checkpoints on the disk, or in the memory, of each host, written more often than those in the run directory.

Each process writes the parts of the state on its own devices, and reads them back after a restart on the same hosts. If
a host was replaced, the run resumes from the checkpoints of orbax in the run directory. The local directory may be in
memory (/dev/shm), which survives the process.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.parallel import hosts
from jaxrl_llm.run.checkpoints import CheckpointError
from jaxrl_llm.run.digests import bits, box_of, by_path, hashed, text_digest

KEEP = 2  # steps to keep: a complete one while the next one is written
_DATA, _MANIFEST = "arrays", "manifest.json"


def run_id(meta: Mapping[str, Any]) -> str:
    """An id of the run: from its metadata, or newly generated. All processes must call it."""
    return meta.get("run_id") or hosts.said_by_all(uuid.uuid4().hex)[0]


@dataclass
class LocalCheckpoints:
    """The local checkpoints of one process.

    Attributes:
      folder: of this process of this run.
      owner: values that must be equal for reading: run, config, number of processes, mesh.
      say: tells people.
    """

    folder: Path
    owner: Mapping[str, Any]
    say: Callable[[str], Any]
    _writing: Future | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "local checkpoints"))

    def save(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> None:
        """Copy the parts of this process from its devices, and write them in the background.

        A disk failure is reported, and only this checkpoint is lost.
        """
        self.wait()
        parts = []
        for path, leaf in by_path(state).items():
            held = bits(leaf)
            shards = held.addressable_shards if isinstance(held, jax.Array) else []
            found = {box_of(shard.index, held.shape): shard.data for shard in shards}
            # Copies: the next step donates the state.
            parts += [(path, box, np.array(data)) for box, data in found.items()]
        self._writing = self._pool.submit(self._write, step, parts, copy.deepcopy(dict(meta)))

    def _write(self, step: int, parts: list[tuple[str, str, np.ndarray]], meta: dict[str, Any]) -> None:
        unfinished = self.folder / f"{step}.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            entries, at = [], 0
            with (unfinished / _DATA).open("wb") as file:
                for path, box, array in parts:
                    entries.append([path, box, str(array.dtype), list(array.shape), at, hashed(array)])
                    at += file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            manifest = {"owner": self.owner, "step": step, "meta": meta, "entries": entries}
            (unfinished / _MANIFEST).write_text(json.dumps(manifest | {"digest": text_digest(manifest)}))
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
            os.replace(unfinished, self.folder / str(step))
            for old in self.steps()[:-KEEP]:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            self.say(f"warning: local checkpoint {step} was not written: {error}; those on the storage are")

    def wait(self) -> None:
        """Until what is being written is there."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self, *, finished: bool) -> None:
        """Wait for pending writes; delete everything if the run has finished."""
        self.wait()
        self._pool.shutdown()
        if finished:
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that were completely written; they may have been damaged since."""
        with contextlib.suppress(OSError):
            return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())
        return []

    def agreed(self, newest: int) -> int | None:
        """The latest step after `newest` that every process has intact; None for none. All processes must call it."""
        good = [step for step in self.steps() if step > newest and self._read(step) is not None]
        everywhere = set.intersection(*(set(json.loads(said)) for said in hosts.said_by_all(json.dumps(good))))
        return max(everywhere, default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata of a step."""
        return self._whole(step)["meta"]

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The state of a step in the sharding of `like`.

        Raises:
          CheckpointError: if it is damaged, or has another structure.
        """
        manifest = self._whole(step)
        data = np.memmap(self.folder / str(step) / _DATA, np.uint8, "r")
        held: dict[tuple[str, str], np.ndarray] = {}
        for path, box, dtype, shape, at, _ in manifest["entries"]:
            kind = jnp.dtype(dtype)
            size = int(np.prod(shape)) * kind.itemsize
            held[path, box] = np.asarray(data[at : at + size]).view(kind).reshape(shape)

        def placed(path: str, leaf: Any) -> Any:
            wanted = bits(leaf)
            boxes = [(shard.device, (path, box_of(shard.index, wanted.shape))) for shard in wanted.addressable_shards]
            if any(at not in held or held[at].dtype != wanted.dtype for _, at in boxes):
                raise CheckpointError(
                    f"local checkpoint {self.folder}/{step} does not hold {path} in the shape of this run"
                )
            parts = [jax.device_put(np.array(held[at]), device) for device, at in boxes]
            whole = jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, parts)
            random = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.wrap_key_data(whole, impl=jax.random.key_impl(leaf)) if random else whole

        leaves = [placed(path, leaf) for path, leaf in by_path(like).items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _whole(self, step: int) -> dict[str, Any]:
        manifest = self._read(step)
        if manifest is None:
            raise CheckpointError(f"local checkpoint {self.folder}/{step} is damaged; remove it")
        return manifest

    def _read(self, step: int) -> dict[str, Any] | None:
        """The manifest of an intact step of this run; None otherwise."""
        try:
            manifest = json.loads((self.folder / str(step) / _MANIFEST).read_text())
            own = manifest.pop("digest")
            data = np.memmap(self.folder / str(step) / _DATA, np.uint8, "r")
            if own != text_digest(manifest) or manifest["owner"] != json.loads(json.dumps(self.owner)):
                return None
            for _, _, dtype, shape, at, digest in manifest["entries"]:
                if hashed(data[at : at + int(np.prod(shape)) * jnp.dtype(dtype).itemsize]) != digest:
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return manifest


def local_checkpoints(
    directory: str, identity: str, config_hash: str, mesh: Any, say: Callable[[str], Any]
) -> LocalCheckpoints:
    """The local checkpoints of this process.

    Args:
      directory: `checkpoints.local_dir`.
      identity: see `run_id`.
      config_hash: of the run.
      mesh: that the state lies on.
      say: tells people.
    """
    process, processes = jax.process_index(), jax.process_count()
    shape = {} if mesh is None else dict(mesh.shape)
    owner = {"run": identity, "config": config_hash, "process": process, "processes": processes, "mesh": shape}
    folder = Path(directory).expanduser() / f"jaxrl-{identity}" / f"process-{process}"
    return LocalCheckpoints(folder, owner, say)
