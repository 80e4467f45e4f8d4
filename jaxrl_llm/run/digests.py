"""Digests of the arrays of a checkpoint, to detect changed bytes on the disk.

Every process hashes the parts that it writes (XXH3, 64 bits, faster than copying memory); restored arrays are hashed in
the same parts, independent of the number of processes and the mesh of the reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import PyTree

from jaxrl_llm.parallel import hosts


class Digest(NamedTuple):
    """The recorded digest of one array.

    Attributes:
      dtype, shape: of the whole array; for a random key, of its bits.
      parts: part as "start:stop,start:stop", one range per axis -> 16 hex digits.
    """

    dtype: str
    shape: Sequence[int]
    parts: Mapping[str, str]


def digests(tree: PyTree) -> dict[str, Digest]:
    """Digests of all arrays of a tree by path. Each process hashes its own parts; all processes must call it."""
    held = {path: bits(leaf) for path, leaf in by_path(tree).items()}
    parts = [(path, box, part) for path, leaf in held.items() for box, part in _own_parts(leaf)]
    found = _in_threads(lambda one: (one[0], one[1], hashed(one[2])), parts)
    made = {path: Digest(str(leaf.dtype), list(leaf.shape), {}) for path, leaf in held.items()}
    for said in hosts.said_by_all(json.dumps(found)):
        for path, box, digest in json.loads(said):
            made[path].parts[box] = digest  # type: ignore[index]
    return made


def changed(read: Mapping[str, np.ndarray], recorded: Mapping[str, Digest]) -> list[str]:
    """Paths of arrays that differ from the recorded digests in dtype, shape or any bit."""

    def same(path: str) -> bool:
        array, digest = read[path], recorded[path]
        if (str(array.dtype), list(array.shape)) != (digest.dtype, list(digest.shape)) or not digest.parts:
            return False
        return all(hashed(array[_slices(box)]) == value for box, value in digest.parts.items())

    paths = sorted(read)
    return [path for path, fine in zip(paths, _in_threads(same, paths), strict=True) if not fine]


def hashed(array: np.ndarray) -> str:
    """XXH3-64 of the bytes of an array in C order."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def text_digest(value: Any) -> str:
    """XXH3-64 of plain data as canonical JSON."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path "a/b/c": the same for dataclasses and for restored dictionaries and lists."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_key(part) for part in path): leaf for path, leaf in leaves}


def _key(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))


def bits(leaf: Any) -> Any:
    """An array as written: for a random key, its bits."""
    key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if key else leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _own_parts(leaf: Any) -> Iterable[tuple[str, Any]]:
    """(box, array) of the parts that this process writes: the first replica of each."""
    if not isinstance(leaf, jax.Array):
        return [(box_of((slice(None),) * leaf.ndim, leaf.shape), leaf)] if hosts.is_main() else []
    return [
        (box_of(shard.index, leaf.shape), np.asarray(shard.data))
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def box_of(index: Sequence[slice], shape: Sequence[int]) -> str:
    """A part of an array as "start:stop,start:stop", one range per axis."""
    ranges = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop, _ in ranges)


def _slices(box: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in box.split(",") if part)


def _in_threads(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, values))
