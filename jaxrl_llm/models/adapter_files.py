"""Writing and reading adapters in the format of the PEFT library: adapter_config.json and adapter_model.safetensors.

There a tensor W [outputs, inputs] has B A beside it, A [rank, inputs] and B [outputs, rank]. Where several tensors are
one matrix here, their adapters are one adapter: it goes out with one A for all of them, and comes in with the ranks
side by side, where they differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.models.adapters import TARGETS, LoraConfig, LowRank
from jaxrl_llm.models.checkpoint_files import StoredTensor, read_json, stored_tensors
from jaxrl_llm.models.families import text_part
from jaxrl_llm.models.tensor_names import Layout, Part, checkpoint_layout, leaves
from jaxrl_llm.models.transformer_config import TransformerConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapters(
    directory: str | Path, params: PyTree, config: TransformerConfig, lora: LoraConfig, *, source: str | Path
) -> list[Path]:
    """Write the adapters of a model for PEFT.

    Args:
      directory: to create; it may exist if it is empty.
      params: with adapters, see `add_adapters`.
      config: of the model.
      lora: config of the adapters.
      source: the checkpoint that they belong to.

    Raises:
      ValueError: for a directory that is not empty, or parameters without adapters.
    """
    directory, source = Path(directory), Path(source)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; export to a new directory")
    layout = checkpoint_layout(config, text_part(read_json(source / "config.json"))[0])
    if any("e" in layout.axes[path] and isinstance(leaf, LowRank) for path, leaf in leaves(params).items()):
        raise ValueError("the experts have adapters, which PEFT has no place for; export the merged weights instead")
    tensors: dict[str, np.ndarray] = {}
    for part, node in _adapted(layout, params):
        box = layout.ranges(part)
        for name, layer, _ in layout.names(part):
            module = _PREFIX + name.removesuffix(".weight")
            down = _inputs_by_rank(layout, part, node.down[layer])
            up = np.asarray(node.up[layer], np.float32)
            kept = layout.axes[part.leaf][1 + TARGETS[part.leaf.split("/")[1]] :]
            up = up[(slice(None), *(slice(box[axis][0], sum(box[axis])) for axis in kept))]
            rows = up.transpose([1 + kept.index(axis) for axis in part.dims[0]] + [0]).reshape(-1, up.shape[0])
            tensors[f"{module}.lora_A.weight"] = down.T
            before = tensors.get(f"{module}.lora_B.weight")
            tensors[f"{module}.lora_B.weight"] = rows if before is None else np.concatenate([before, rows])
    if not tensors:
        raise ValueError("the parameters have no adapters; give those of a run with section lora, before merged()")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    # safetensors writes an array in its memory layout.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return [directory / CONFIG, directory / WEIGHTS]


def load_adapters(directory: str | Path, params: PyTree, config: TransformerConfig, *, source: str | Path) -> PyTree:
    """The parameters with the adapters of a PEFT directory added; `merged` folds them into plain parameters.

    Args:
      directory: adapter_config.json and adapter_model.safetensors.
      params: plain, of the checkpoint that the adapters belong to.
      config: of the model.
      source: that checkpoint.

    Raises:
      ValueError: for adapters of another kind, or for tensors that this model lacks or that cannot have an adapter.
    """
    described, stored = read_json(Path(directory) / CONFIG), stored_tensors(directory)
    for key, needed in (("peft_type", "LORA"), ("bias", "none")):
        if described.get(key, needed) != needed:
            raise ValueError(f"{directory}/{CONFIG} has {key} {described[key]!r}; only {needed!r} is supported")
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if described.get(key):
            raise ValueError(f"{directory}/{CONFIG} has {key} {described[key]!r}, which is not supported")
    rank, alpha = described["r"], described["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
    layout = checkpoint_layout(config, text_part(read_json(Path(source) / "config.json"))[0])
    used: set[str] = set()
    nodes: dict[str, list[tuple[Part, np.ndarray, np.ndarray]]] = {}
    for part, _ in _adapted(layout, params, adapted=False):
        found = [_pair(stored, name, part, layout, used) for name, _, _ in layout.names(part)]
        if any(pair is not None for pair in found):
            empty = next(pair for pair in found if pair is not None)
            pairs = [pair or (np.zeros_like(empty[0]), np.zeros_like(empty[1])) for pair in found]
            downs, ups = (np.stack(each) for each in zip(*pairs, strict=True))
            nodes.setdefault(part.leaf, []).append((part, downs, ups))
    if stray := sorted(set(stored) - used):
        raise ValueError(
            f"{directory}/{WEIGHTS} has adapters that this model has no place for: {', '.join(stray[:6])}; adapters go "
            "on the projections of attention and of MLPs that are not experts"
        )
    placed = {stack: dict(blocks) if isinstance(blocks, Mapping) else blocks for stack, blocks in params.items()}
    for leaf, pieces in nodes.items():
        stack, name = leaf.split("/")
        placed[stack][name] = _node(layout, leaf, params[stack][name], pieces, scale)
    return placed


def _adapted(layout: Layout, params: PyTree, *, adapted: bool = True) -> list[tuple[Part, Any]]:
    """The parts of matrices that have or could have an adapter."""
    found = []
    for part in layout.parts:
        stack, _, name = part.leaf.rpartition("/")
        if not stack or name not in TARGETS or "e" in layout.axes[part.leaf]:
            continue
        node = params[stack][name]
        if isinstance(node, LowRank) == adapted:
            found.append((part, node))
    return found


def _inputs_by_rank(layout: Layout, part: Part, down: Any) -> np.ndarray:
    """`down` [*I, rank] with its input axes in the order of the tensor, as [inputs, rank]."""
    axes = layout.axes[part.leaf][1 : 1 + TARGETS[part.leaf.split("/")[1]]]
    down = np.asarray(down, np.float32)
    return down.transpose([axes.index(axis) for axis in part.dims[1]] + [len(axes)]).reshape(-1, down.shape[-1])


def _pair(
    stored: Mapping[str, StoredTensor], name: str, part: Part, layout: Layout, used: set[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """(A, the rows of B that are the part's) of one tensor."""
    module = _PREFIX + name.removesuffix(".weight")
    names = [f"{module}.lora_{letter}.weight" for letter in "AB"]
    if names[0] not in stored:
        return None
    used.update(names)
    down, up = (np.asarray(stored[name].read((...,)), np.float32) for name in names)
    rows = layout.part_shape(part)[0]
    return down, up[part.first_row : part.first_row + rows]


def _node(layout: Layout, leaf: str, base: Any, pieces: list, scale: float) -> LowRank:
    """One adapter for a matrix: the same A once, others side by side."""
    axes, inputs = layout.axes[leaf][1:], TARGETS[leaf.split("/")[1]]
    sizes = dict(zip(axes, base.shape[1:], strict=True))
    layers, rank = pieces[0][1].shape[:2]
    same = all(np.array_equal(down, pieces[0][1]) for _, down, _ in pieces)
    total = rank if same else rank * len(pieces)
    wide = np.zeros((layers, *base.shape[1 : 1 + inputs], total), np.float32)
    tall = np.zeros((layers, total, *base.shape[1 + inputs :]), np.float32)
    for number, (part, down, up) in enumerate(pieces):
        at = slice(0, rank) if same else slice(number * rank, (number + 1) * rank)
        ranges = layout.ranges(part)
        ordered = down.reshape(layers, rank, *(sizes[axis] for axis in part.dims[1]))
        wide[..., at] = ordered.transpose([0, *(2 + part.dims[1].index(axis) for axis in axes[:inputs]), 1])
        ordered = up.reshape(layers, *(ranges[axis][1] for axis in part.dims[0]), rank)
        box = tuple(slice(ranges[axis][0], sum(ranges[axis])) for axis in axes[inputs:])
        kept = [1 + part.dims[0].index(axis) for axis in axes[inputs:]]
        tall[(slice(None), at, *box)] = ordered.transpose([0, len(part.dims[0]) + 1, *kept])
    return LowRank(base, jnp.asarray(wide), jnp.asarray(tall), scale)
