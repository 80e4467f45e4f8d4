"""Import of weights: a checkpoint directory -> parameters, read slice by slice into their sharding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from jaxrl_llm.models.checkpoint_files import StoredTensor, check_tensors, read_json, stored_tensors
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.families import config_from_json, is_reward_model, is_vision_language, text_part
from jaxrl_llm.models.imported import is_imported, read_imported
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.packed import packing_of, unpacked, with_split_experts, without_empty_biases
from jaxrl_llm.models.tensor_names import IN_FLOAT32, Layout, Part, checkpoint_layout, layer_of, leaves
from jaxrl_llm.models.text_tensors import text_names
from jaxrl_llm.models.transformer_config import TransformerConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_COMPARED_AT_ONCE = 4096
_NUMBERS_AT_ONCE = 2**22
_EXPONENT = 0x7F80  # exponent bits of bfloat16, which are all set only in NaN and infinities


def load_model(
    directory: str | Path, *, sharding: Sharding | PyTree | None = None, strict: bool = False, **execution: Any
) -> tuple[Model, PyTree]:
    """The model and the parameters of a checkpoint directory.

    Args:
      directory: config.json and safetensors files.
      sharding, strict: as for `load_params`.
      execution: attention, layer_loop, parameter_dtype, compute_dtype, context_tokens (see `config_from_json`).

    Raises:
      FileNotFoundError: for a missing path or file.
      ValueError: for a config or tensors that are not supported or do not fit.
    """
    model = transformer(load_config(directory, **execution))
    return model, load_params(directory, model.config, sharding=sharding, strict=strict)


def load_config(directory: str | Path, *, scores: bool = False, **execution: Any) -> TransformerConfig:
    """The config of a checkpoint directory.

    Args:
      directory: with config.json.
      scores: the directory must be a reward model; returns the config of its backbone (see sequence_classifiers.py).
      execution: as for `config_from_json`.

    Raises:
      FileNotFoundError: for a missing path.
      ValueError: for a config that is not supported, or if `scores` does not match the kind of model.
    """
    directory = Path(directory)
    if not directory.exists():
        raise FileNotFoundError(
            f"model path {directory} does not exist; give the directory with config.json and the weights"
        )
    described = read_json(directory / "config.json")
    try:
        config = config_from_json(described, **execution)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if is_reward_model(described) != scores:
        raise ValueError(
            f"{directory} is not a reward model: config.json has architectures {described.get('architectures')}, which "
            "has no head for scores; give the directory of a reward model"
            if scores
            else f"{directory} is a reward model ({described['architectures'][0]}), which cannot generate text; use it "
            "as a network: networks.reward.path"
        )
    if is_vision_language(described):
        warnings.warn(
            f"{directory} is a vision-language checkpoint: only its text model is used; an export copies the other "
            "tensors unchanged",
            stacklevel=2,
        )
    return config


def longest_context(directory: str | Path) -> int | None:
    """Tokens of the longest sequence that a checkpoint directory is made for: the context length of its config.json, or
    the one that scaled rotary angles reach, whichever is larger; None if it names none."""
    config = read_json(Path(directory) / "config.json")
    config = config.get("text_config") or config
    stretched = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor, original = stretched.get("factor"), stretched.get("original_max_position_embeddings")
    reached = int(factor * original) if factor and original else 0
    return max(config.get("max_position_embeddings") or 0, reached) or None


def load_params(
    directory: str | Path,
    config: TransformerConfig,
    *,
    sharding: Sharding | PyTree | None = None,
    strict: bool = False,
) -> PyTree:
    """Parameters as `transformer_specs` describes them, in the config's `parameter_dtype`.

    Each process reads only the slices of its own devices, leaf by leaf, so that no host needs memory for the whole
    model.

    Args:
      directory: config.json and safetensors files, or the output of `save_imported`.
      config: of the model.
      sharding: one for all leaves, or a tree with one for each leaf; None places all on the first device.
      strict: weights that are NaN or infinite are an error; otherwise they are a warning.

    Raises:
      FileNotFoundError: for a missing path or file.
      ValueError: for missing, surplus or mis-shaped tensors, damaged files, or a tied head that differs.
    """
    if is_imported(directory):
        everywhere = SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding
        return read_imported(directory, transformer(config), sharding=everywhere)
    layout, stored = stored_model(directory, config)
    check_tensors(layout.tensors(), stored, ignored=[HEAD] if config.tie_embeddings else [])
    if config.tie_embeddings and HEAD in stored:
        _check_tied(stored)
    shardings = _per_leaf(layout, sharding)
    loaded: dict[str, Any] = {}
    not_finite: list[str] = []
    for path, shape in layout.shapes.items():
        slices: dict[tuple, np.ndarray] = {}

        dtype = jnp.dtype("float32" if path.endswith(IN_FLOAT32) else config.parameter_dtype)

        def read(index, path=path, slices=slices, dtype=dtype):
            # Devices with the same slice share one read.
            key = tuple((part.start, part.stop) for part in index)
            if key not in slices:
                slices[key] = leaf_slice(layout, path, index, stored, dtype)
                if not _finite(slices[key]):
                    not_finite.append(path)
            return slices[key]

        *above, name = path.split("/")
        tree = loaded
        for section in above:
            tree = tree.setdefault(section, {})
        tree[name] = jax.make_array_from_callback(shape, shardings[path], read, dtype=dtype)
    if not_finite:
        problem = f"{directory} has weights that are NaN or infinite, in {', '.join(dict.fromkeys(not_finite))}"
        if strict:
            raise ValueError(f"{problem}; copy the files again, or load it without strict")
        warnings.warn(f"{problem}; the outputs of the model will be NaN", stacklevel=2)
    return loaded


def stored_model(directory: str | Path, config: TransformerConfig) -> tuple[Layout, dict[str, StoredTensor]]:
    """(the layout of the checkpoint, the stored tensors of the text model by the names of the layout)."""
    described, stored = read_json(Path(directory) / "config.json"), stored_tensors(directory)
    architecture, source = text_part(described)
    if is_vision_language(described):
        stored = {ours: stored[theirs] for ours, theirs in text_names(stored).items()}
    # Not read here: layers for multi-token prediction, and the head of a reward model.
    apart = ("mtp.", "score.") if is_reward_model(described) else "mtp."
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(apart)}
    stored = unpacked(stored, source, packing_of(source, architecture))
    layout = checkpoint_layout(config, architecture)
    if source.get("quantization_config"):
        stored = without_empty_biases(stored, layout.tensors())
    if not any(part.holds_experts for part in layout.parts):
        stored = with_split_experts(stored)
    if source.get("num_nextn_predict_layers"):
        # Layers for multi-token prediction may also be stored after the last layer.
        stored = {name: tensor for name, tensor in stored.items() if (layer_of(name) or 0) < config.layers}
    return layout, stored


def _finite(array: np.ndarray) -> bool:
    """Whether an array of float32 or bfloat16 has neither NaN nor infinities."""
    flat = array.reshape(-1)
    flat = flat.view(np.uint16) if array.dtype.itemsize == 2 else flat
    for start in range(0, flat.size, _NUMBERS_AT_ONCE):
        part = flat[start : start + _NUMBERS_AT_ONCE]
        if not (np.isfinite(part) if array.dtype.itemsize == 4 else part & _EXPONENT != _EXPONENT).all():
            return False
    return True


def _per_leaf(layout: Layout, sharding: Sharding | PyTree | None) -> dict[str, Sharding]:
    if sharding is None:
        sharding = SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, Sharding):
        return dict.fromkeys(layout.shapes, sharding)
    given = leaves(sharding)
    if given.keys() != layout.shapes.keys():
        raise ValueError(
            f"the tree of shardings has {', '.join(sorted(given))}, but the parameters are "
            f"{', '.join(sorted(layout.shapes))}; give one sharding for each parameter, or one for all"
        )
    return given


def leaf_slice(
    layout: Layout, path: str, index: tuple[slice, ...], stored: Mapping[str, StoredTensor], dtype: Any
) -> np.ndarray:
    """A slice of one of our leaves, assembled from the tensors that overlap it."""
    axes, shape = layout.axes[path], layout.shapes[path]
    box = {axis: part.indices(size)[:2] for axis, part, size in zip(axes, index, shape, strict=True)}
    out = np.empty([stop - start for start, stop in box.values()], dtype)
    for part in layout.parts:
        if part.leaf != path:
            continue
        ranges = layout.ranges(part)
        overlap = {
            axis: (max(box[axis][0], first), min(box[axis][1], first + size)) for axis, (first, size) in ranges.items()
        }
        if any(start >= stop for start, stop in overlap.values()):
            continue
        for layer in range(*overlap.get("l", (0, 1))):
            experts = overlap.get("e", (0, 1))
            for expert in range(1) if part.holds_experts else range(*experts):
                one = overlap | {"l": (layer, layer + 1), "e": experts if part.holds_experts else (expert, expert + 1)}
                target = tuple(slice(one[axis][0] - box[axis][0], one[axis][1] - box[axis][0]) for axis in axes)
                read = _read_part(part, ranges, one, stored[layout.name(part, layer, expert)], axes)
                out[target] = read.reshape(out[target].shape)
    return out


def _read_part(
    part: Part,
    ranges: Mapping[str, tuple[int, int]],
    overlap: Mapping[str, tuple[int, int]],
    tensor: StoredTensor,
    axes: str,
) -> np.ndarray:
    """The overlap of a part and a slice of its leaf, read from its tensor, with the axes in our order."""
    rows, inner, shape = [], [], []
    for dimension, names in enumerate(part.dims):
        sizes = [ranges[axis][1] for axis in names]
        local = [(overlap[axis][0] - ranges[axis][0], overlap[axis][1] - ranges[axis][0]) for axis in names]
        # Slices of the slowest axis of size above 1 are contiguous in the file; faster axes are sliced in memory.
        slowest = next((i for i, size in enumerate(sizes) if size > 1), 0)
        stride = math.prod(sizes[slowest + 1 :])
        start, stop = local[slowest]
        first = part.first_row if dimension == 0 else 0
        rows.append(slice(first + start * stride, first + stop * stride))
        shape += [*sizes[:slowest], stop - start, *sizes[slowest + 1 :]]
        inner += [slice(*span) for span in local[:slowest]]
        inner += [slice(None), *(slice(*span) for span in local[slowest + 1 :])]
    order = "".join(part.dims)
    read = tensor.read(tuple(rows)).reshape(shape)[tuple(inner)]
    return read.transpose([order.index(axis) for axis in axes if axis in order])


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError if a checkpoint with tied embeddings also stores a head that differs from the embedding."""
    embedding, head = stored[EMBEDDING], stored[HEAD]
    same = embedding.shape == head.shape
    for start in range(0, embedding.shape[0] if same else 0, _ROWS_COMPARED_AT_ONCE):
        rows = (slice(start, min(start + _ROWS_COMPARED_AT_ONCE, embedding.shape[0])), slice(None))
        same = same and np.array_equal(embedding.read(rows), head.read(rows))
    if not same:
        raise ValueError(
            f"config.json has tie_word_embeddings true, but {HEAD} differs from {EMBEDDING}; set tie_word_embeddings "
            "to false to keep the head, or remove the head"
        )
