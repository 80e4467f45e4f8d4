"""A checkpoint directory in orbax's layout: `jaxrl import` writes it, and a mesh restores it without safetensors.

Beside `params/` it holds config.json, tokenizer and template, so it can be used in place of a Hugging Face directory;
for a vision-language model it also holds the tensors that are not text.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxrl_llm.models.checkpoint_files import read_json
from jaxrl_llm.models.export import COPIED, carried_tensors
from jaxrl_llm.models.families import is_vision_language
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import abstract

PARAMS = "params"
# The tensors of a vision-language checkpoint outside its text part, for an export.
OTHERS = "vision.safetensors"


def is_imported(directory: str | Path) -> bool:
    """Whether the weights of a directory are in orbax's layout."""
    return (Path(directory) / PARAMS).is_dir()


def save_imported(directory: str | Path, params: PyTree, *, source: str | Path) -> Path:
    """Write parameters with orbax, and the other files of the model beside them.

    The directory appears only when it is complete.

    Args:
      directory: to create; it may exist if it is empty.
      params: of the model; may be sharded.
      source: the checkpoint directory that they were read from.

    Raises:
      ValueError: for a directory that is not empty.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; import to a new directory")
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    import orbax.checkpoint as ocp  # takes a while to import

    with ocp.StandardCheckpointer() as writer:
        writer.save(partial / PARAMS, params)
    for name in ("config.json", *COPIED):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, partial / name)
    if is_vision_language(read_json(partial / "config.json")):
        from safetensors.numpy import save_file

        others = carried_tensors(source)[1]
        save_file({name: tensor.read((...,)) for name, tensor in others.items()}, partial / OTHERS)
    if directory.exists():
        directory.rmdir()
    return partial.rename(directory)


def read_imported(directory: str | Path, model: Model, *, sharding: jax.sharding.Sharding | PyTree) -> PyTree:
    """Parameters of a directory that `save_imported` wrote, in the model's own dtypes.

    Args:
      directory: config.json and params/.
      model: made of that config.json.
      sharding: of every leaf, or a tree with one for each.

    Raises:
      ValueError: if the stored parameters differ from the model's; names them.
    """
    wanted = abstract(model.specs)
    path = (Path(directory) / PARAMS).resolve()
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(path).item_metadata.tree
        shapes = [_shapes(tree) for tree in (wanted, stored)]
        if wrong := sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)):
            raise ValueError(
                f"{path} does not hold the parameters that config.json describes: {', '.join(wrong)}; import the "
                "model again"
            )
        everywhere = isinstance(sharding, jax.sharding.Sharding)
        shardings = jax.tree.map(lambda _: sharding, wanted) if everywhere else sharding
        placed = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), wanted, shardings
        )
        return reader.restore(path, placed)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(jnp.shape(leaf)) for path, leaf in flat}
