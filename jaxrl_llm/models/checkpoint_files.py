"""The files of a Hugging Face checkpoint directory, checked before tensors are read."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import file_bytes, parsed_json, shortened, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PRECISIONS = ("BF16", "F32", "F16")
_MOST_BYTES = 2**26  # of a file of settings


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, not yet read.

    Attributes:
      path: its file.
      name: its name in the file.
      shape: its dimensions.
      dtype: as the file names it, such as "BF16".
      handle: the open file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    handle: Any

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        width = re.search(r"(\d+)(?:_E\dM\d.*)?$", self.dtype)  # BF16, F8_E4M3, I64, U8; BOOL has none
        return math.prod(self.shape) * (int(width[1]) if width else 8) // 8

    def read(self, ranges: tuple[Any, ...]) -> np.ndarray:
        """A slice of the tensor; nothing outside it is read."""
        try:
            if self.dtype == "F8_E4M3":  # numpy has no such type, and the library asks numpy
                return self._mapped(np.uint8)[ranges].view(jnp.float8_e4m3fn)
            return self.handle.get_slice(self.name)[ranges]
        except Exception as error:  # safetensors' own error type derives from Exception alone
            raise ValueError(f"{self.path} cannot be read at {self.name}: {error}; copy the file again") from error

    def _mapped(self, dtype: Any) -> np.ndarray:
        """The tensor, memory-mapped from its file."""
        start, header = _header(self.path)
        return np.memmap(self.path, dtype, "r", offset=start + header[self.name]["data_offsets"][0], shape=self.shape)


@functools.lru_cache(maxsize=256)
def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(offset of the tensor data in a file, its header)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a directory with {path.name}, as transformers' save_pretrained writes it"
        )
    try:
        read = parsed_json(file_bytes(path, _MOST_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the file again") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds {type(read).__name__}, not an object of fields; copy the file again")
    return read


def stored_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from one safetensors file or from several with an index.

    Raises:
      FileNotFoundError: for a path that does not exist, no weights, or an index that names a missing file.
      ValueError: for pickle files, which run code when they are read; for a file that is cut off or damaged; for an
        index that does not match the files.
    """
    directory = Path(directory)
    _refuse_pickles([directory])
    if not directory.is_dir():
        found = "is a file, not a directory" if directory.exists() else "does not exist"
        raise FileNotFoundError(
            f"model path {directory} {found}; give the directory that holds config.json and the safetensors files"
        )
    if (directory / INDEX).exists():
        return _indexed(directory)
    files = sorted(directory.glob("*.safetensors"))
    if (directory / SINGLE) in files:
        files = [directory / SINGLE]
    if not files:
        _refuse_pickles(directory.iterdir())
        raise FileNotFoundError(f"{directory} holds no {SINGLE} and no {INDEX}; give a directory with weights")
    if len(files) > 1:
        raise ValueError(
            f"{directory} holds {_few([file.name for file in files])} but no {INDEX} that says which tensors are "
            "where; copy the index too"
        )
    return _opened(files[0])


def _indexed(directory: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{directory / INDEX} has no weight_map of tensor names to files; copy the file again")
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str) or not 0 < len(file) < 256]:
        raise ValueError(
            f"{directory / INDEX} lists {shown(wrong[0])} in {shown(weight_map[wrong[0]])}, which is no name of a "
            "file; copy the file again"
        )
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{directory / INDEX} names files outside its directory: {_few(outside)}; refused")
    _refuse_pickles(Path(name) for name in names)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory / INDEX} names {_few(missing)}, which {directory} does not hold; copy all files"
        )
    shards = {name: _opened(directory / name) for name in names}
    listed = {(tensor, file) for tensor, file in weight_map.items()}
    there = {(tensor, file) for file, tensors in shards.items() for tensor in tensors}
    if listed != there:
        wrong = [f"{tensor} (listed in {file}, not there)" for tensor, file in sorted(listed - there)]
        wrong += [f"{tensor} (in {file}, not listed)" for tensor, file in sorted(there - listed)]
        raise ValueError(f"{directory / INDEX} does not fit its files: {_few(wrong)}; copy index and files again")
    return {tensor: shards[file][tensor] for tensor, file in weight_map.items()}


def _opened(path: Path) -> dict[str, StoredTensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reading a checkpoint needs safetensors; pip install 'jaxrl_llm[hf]'") from None
    if not path.is_file():
        raise ValueError(f"{path} is a pipe, socket or device; copy the file again")
    try:
        handle: Any = safe_open(path, framework="np")
        described = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged ({shortened(str(error), 300)}); copy the file again") from None
    return {
        name: StoredTensor(path, name, tuple(tensor.get_shape()), tensor.get_dtype(), handle)
        for name, tensor in described.items()
    }


def _refuse_pickles(paths: Iterable[Path]) -> None:
    if pickles := sorted(path.name for path in paths if path.suffix in _PICKLES):
        raise ValueError(
            f"{', '.join(pickles)}: pickle files are not read, because reading one runs the code inside; convert the "
            "model to safetensors (transformers' save_pretrained does)"
        )


def _few(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list, and the number of further ones."""
    told = ", ".join(shortened(name, 120) for name in names[:most])
    return told + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], *, ignored: Iterable[str] = ()
) -> None:
    """Compare names, shapes and data types before anything is read.

    Args:
      expected: shape of every tensor that the model needs.
      stored: what the files hold.
      ignored: names that may be present and are not read.

    Raises:
      ValueError: one, with every missing, surplus and mis-shaped tensor and every wrong data type by name.
    """
    # Older Llama checkpoints also store the rotary frequencies, which follow from the config.
    allowed = {*expected, *ignored, *(name for name in stored if name.endswith("rotary_emb.inv_freq"))}
    both = [name for name in expected if name in stored]
    problems = {
        "missing": [name for name in expected if name not in stored],
        "surplus": [name for name in stored if name not in allowed],
        "mis-shaped": [
            f"{name} (has {stored[name].shape}, needs {expected[name]})"
            for name in both
            if stored[name].shape != expected[name]
        ],
        f"of a data type other than {', '.join(_PRECISIONS)}": [
            f"{name} ({stored[name].dtype})" for name in both if stored[name].dtype not in _PRECISIONS
        ],
    }
    if found := [f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names]:
        raise ValueError(
            f"the tensors do not fit config.json: {'; '.join(found)}. Take config.json and weights of one and the "
            "same model; a head of its own (lm_head.weight) goes with tie_word_embeddings false"
        )
