"""A policy read back from where it lies: a run, one of its checkpoints, or a model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
from jaxtyping import PyTree

from jaxrl_llm import data, hub
from jaxrl_llm.config import ConfigError, load_config
from jaxrl_llm.data import CharacterTokenizer, Tokenizer
from jaxrl_llm.models import weights
from jaxrl_llm.models.model import Model
from jaxrl_llm.training import checkpoints
from jaxrl_llm.training.setup import Parts, parts


@dataclass(frozen=True)
class Policy:
    """What can be sampled from and scored with.

    Attributes:
      model: pure functions.
      params: their parameters.
      tokenizer: text <-> tokens.
      source: where it was read from.
    """

    model: Model
    params: PyTree
    tokenizer: Tokenizer
    source: Path


def restored_run(path: str | Path) -> tuple[Parts, Policy]:
    """The parts and the newest (or the named) policy of a run directory or checkpoint.

    Raises:
      ConfigError: when the run's config.yaml is not there.
      CheckpointError: when there is no checkpoint, or it does not fit the config.
    """
    folder, step = checkpoints.latest_checkpoint(path)
    stored = folder.parent / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"{stored} is missing: a checkpoint is read with the config.yaml of its run beside it")
    built = parts(load_config(stored, vocabulary_size=CharacterTokenizer().vocabulary_size))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device),
        jax.eval_shape(built.model.init, jax.random.key(0)),
    )
    params = checkpoints.restore_params(folder, step, placed)
    return built, Policy(built.model, params, built.tokenizer, folder / str(step))


def restored_policy(path: str | Path, *, dtype: str | None = None) -> Policy:
    """The policy of a run, a checkpoint, or a model directory (or owner/name of a repository).

    Args:
      path: where it lies.
      dtype: to compute in, for a model directory; None takes the stored one.

    Raises:
      ValueError: when there is no model.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return restored_run(path)[1]
    directory = hub.model_directory(path)
    execution = {} if dtype is None else {"parameter_dtype": dtype, "compute_dtype": dtype}
    model, params = weights.load_model(directory, **execution)
    tokenizer = data.load_tokenizer(directory)
    data.require_embedding(tokenizer, model.vocabulary_size)
    return Policy(model, params, tokenizer, directory)
