"""Export: parameters -> a directory that `transformers` loads, in safetensors files of bounded size."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxrl_llm.models.adapters import LowRank
from jaxrl_llm.models.checkpoint_files import INDEX, SINGLE, StoredTensor, read_json, stored_tensors
from jaxrl_llm.models.families import as_reward_model, config_to_json, is_vision_language, text_part
from jaxrl_llm.models.int4 import QuantisedInGroups
from jaxrl_llm.models.int8 import Quantised
from jaxrl_llm.models.tensor_names import IN_FLOAT32, Layout, Part, checkpoint_layout, layer_of, leaves
from jaxrl_llm.models.text_tensors import text_names
from jaxrl_llm.models.transformer_config import Precision, TransformerConfig

SCORE = "score.weight"  # of a reward model
# Further files of a model, which are copied unchanged.
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def save_model(
    directory: str | Path,
    params: PyTree,
    config: TransformerConfig,
    *,
    source: str | Path | None = None,
    dtype: Precision | None = None,
    max_shard_bytes: int = 5 * 10**9,
    score: Array | None = None,
    pad_id: int | None = None,
) -> list[Path]:
    """Write config.json, safetensors files with their index, and the files that came with the model.

    The directory appears only when it is complete. In a run of several processes all call this, and the first writes.

    Args:
      directory: to create; it may exist if it is empty.
      params: as `transformer_specs` describes; may be sharded.
      config: of the model.
      source: the directory that it was imported from: its config.json is kept, its tokenizer files and
        generation_config.json are copied. None writes a config.json of a family that fits.
      dtype: of the stored tensors; None takes the config's `parameter_dtype`.
      max_shard_bytes: size of one file, unless a single tensor is larger.
      score: of a reward model, what multiplies hidden states [1, D]; the scores of the vocabulary are then left out.
      pad_id: of a reward model, see `families.as_reward_model`.

    Returns:
      the files written; empty in other processes than the first.

    Raises:
      ValueError: for a directory that is not empty, parameters of another shape, or a config that no family can say.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; export to a new directory")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    original = None if source is None else read_json(Path(source) / "config.json")
    described = config_to_json(config, original=original)
    if score is not None:
        described, config = as_reward_model(described, pad_id), replace(config, tie_embeddings=True)
        params = {name: leaf for name, leaf in params.items() if name != "unembedding"}
    stored_as = dtype or config.parameter_dtype
    for part in (described, described.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if part is not None and key in part:
                part[key] = stored_as
    layout = checkpoint_layout(config, text_part(described)[0])
    given = leaves(params)
    if special := sorted(
        path for path, leaf in given.items() if isinstance(leaf, LowRank | Quantised | QuantisedInGroups)
    ):
        raise ValueError(f"the parameters at {', '.join(special)} have adapters or few bits; give merged(params)")
    shapes = {path: tuple(leaf.shape) for path, leaf in given.items()}
    if shapes != dict(layout.shapes):
        wrong = sorted(path for path in {*shapes, *layout.shapes} if shapes.get(path) != layout.shapes.get(path))
        raise ValueError(f"the parameters do not fit the config at {', '.join(wrong)}; give those of the same model")

    writes = jax.process_index() == 0
    partial = directory.with_name(f"{directory.name}.partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        for name in COPIED if source is not None else ():
            if (Path(source or "") / name).is_file():
                shutil.copyfile(Path(source or "") / name, partial / name)
    named, carried = carried_tensors(source) if source is not None and is_vision_language(described) else (str, {})
    if score is not None:
        carried = {SCORE: Held(np.asarray(jax.device_get(score), jnp.dtype(stored_as)))}
    _write_shards(partial, layout, given, jnp.dtype(stored_as), max_shard_bytes, writes, named, carried)
    if not writes:
        return []
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)
    return sorted(directory.iterdir())


@dataclass(frozen=True)
class Held:
    """An array with the interface of a checkpoint tensor."""

    array: np.ndarray

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.array.nbytes

    def read(self, ranges: tuple[Any, ...]) -> np.ndarray:
        """A slice of it."""
        return self.array[ranges]


def carried_tensors(source: str | Path) -> tuple[Callable[[str], str], dict[str, StoredTensor]]:
    """(our tensor name -> its name among those of a vision-language checkpoint, the tensors that are not text)."""
    stored = stored_tensors(source)
    text = text_names(stored)
    others = {name: tensor for name, tensor in stored.items() if name not in text.values()}

    def named(ours: str) -> str:
        return text.get(ours, ours if ours == "lm_head.weight" else ours.replace("model.", "model.language_model.", 1))

    return named, others


def shard_plan(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Tensor names of each file, in order: a file is closed before it would grow beyond the limit.

    >>> shard_plan({"a": 3, "b": 3, "c": 9, "d": 1}, max_shard_bytes=6)
    [['a', 'b'], ['c'], ['d']]
    """
    files, used = [[]], 0
    for name, size in sizes.items():
        if files[-1] and used + size > max_shard_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _write_shards(
    directory: Path,
    layout: Layout,
    params: Mapping[str, Array],
    dtype: Any,
    max_shard_bytes: int,
    writes: bool,
    named: Callable[[str], str],
    carried: Mapping[str, StoredTensor | Held],
) -> None:
    """Write our tensors under their names in the checkpoint, and the carried tensors unchanged."""
    from safetensors.numpy import save_file

    tensors = layout.tensors()
    pieces: dict[str, list[tuple[Part, int, int]]] = {name: [] for name in tensors}
    for part in layout.parts:
        for name, layer, expert in layout.names(part):
            pieces[name].append((part, layer, expert))
    # By layer, so that the leaves of one layer are fetched once and then freed.
    ordered = sorted(tensors, key=lambda name: -1 if (layer := layer_of(name)) is None else layer)
    wide = {name for name in tensors if pieces[name][0][0].leaf.endswith(IN_FLOAT32)}
    stored_as = {name: jnp.dtype("float32") if name in wide else dtype for name in tensors}
    sizes = {name: math.prod(tensors[name]) * stored_as[name].itemsize for name in ordered}
    sizes |= {name: tensor.bytes for name, tensor in carried.items()}
    plan = shard_plan(sizes, max_shard_bytes)

    @functools.lru_cache(maxsize=len(layout.shapes))
    def fetched(path: str, layer: int) -> np.ndarray:
        return fetch(params[path], layer if layout.axes[path][0] == "l" else None)

    weight_map = {}
    for number, names in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        built = {
            named(name): tensor_of(layout, pieces[name], fetched, tensors[name], stored_as[name])
            for name in names
            if name not in carried
        }
        built |= {name: carried[name].read((...,)) for name in names if name in carried}
        weight_map |= dict.fromkeys(built, file)
        if writes:
            # transformers refuses a file that does not name its framework.
            save_file(built, directory / file, metadata={"format": "pt"})
    if writes and len(plan) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def fetch(leaf: Array, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, on the host, from any sharding."""
    sharding = getattr(leaf, "sharding", None)
    everywhere = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
    return np.asarray(_layer(leaf, layer, everywhere))


@functools.partial(jax.jit, static_argnames="everywhere")
def _layer(leaf: Array, layer: int | None, everywhere: NamedSharding | None) -> Array:
    taken = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return taken if everywhere is None else jax.lax.with_sharding_constraint(taken, everywhere)


def tensor_of(
    layout: Layout,
    pieces: list[tuple[Part, int, int]],
    fetched: Callable[[str, int], np.ndarray],
    shape: tuple[int, ...],
    dtype: Any,
) -> np.ndarray:
    """One tensor of the checkpoint from the parts of our leaves that make it up."""
    out = np.empty(shape, dtype)
    for part, layer, expert in pieces:
        axes, ranges = layout.axes[part.leaf], layout.ranges(part)
        box = fetched(part.leaf, layer)
        if "e" in axes and not part.holds_experts:
            box = box[expert]
        kept = [axis for axis in axes if axis in "".join(part.dims)]
        box = box[tuple(slice(ranges[axis][0], sum(ranges[axis])) for axis in kept)]
        rows, *rest = layout.part_shape(part)
        ordered = box.transpose([kept.index(axis) for axis in "".join(part.dims)]).reshape(rows, *rest)
        out[part.first_row : part.first_row + rows] = ordered
    return out
