"""Reward models in the files of Hugging Face: `*ForSequenceClassification` with one label, in and out.

The score of a text is the head's one output at its last token, here by the row's length, in `transformers` the last
token that is not padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from jaxrl_llm.models.checkpoint_files import read_json, stored_tensors
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.export import SCORE, save_model
from jaxrl_llm.models.families import is_reward_model
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer_config import Precision, TransformerConfig
from jaxrl_llm.models.weights import load_config, load_params


def holds_reward_model(directory: str | Path) -> bool:
    """Whether the config.json of a directory is that of a reward model."""
    return is_reward_model(read_json(Path(directory) / "config.json"))


def load_reward_model(directory: str | Path, **execution: Any) -> tuple[Model, PyTree]:
    """(the backbone, {"backbone": its parameters, "head": {"weight": [D, 1]}}), as `sequence_reward` takes them.

    Args:
      directory: config.json and safetensors files.
      execution: how to compute, as for `load_model`.

    Raises:
      FileNotFoundError: for a path or file that is not there.
      ValueError: for a model of another kind, without its head or with several labels, or anything that does not fit.
    """
    model = transformer(load_config(directory, scores=True, **execution))
    return model, load_reward_params(directory, model.config)


def load_reward_params(directory: str | Path, config: TransformerConfig) -> PyTree:
    """The parameters of a reward model, as `load_reward_model` says."""
    stored = stored_tensors(directory)
    if SCORE not in stored:
        raise ValueError(
            f"{directory} is said to be a reward model by its config.json, but holds no {SCORE}; copy the files again, "
            "or train a head: networks.reward.head=scalar"
        )
    if (shape := stored[SCORE].shape) != (1, config.width):
        raise ValueError(
            f"{directory} has a head {SCORE} of {shape[0]} labels for {shape[-1]} hidden numbers; a reward model has "
            f"one label, for {config.width} of them"
        )
    weight = jnp.asarray(stored[SCORE].read((slice(None), slice(None)))).astype(jnp.float32).T
    return {"backbone": load_params(directory, config), "head": {"weight": weight}}


def save_reward_model(
    directory: str | Path,
    params: PyTree,
    config: TransformerConfig,
    *,
    source: str | Path | None = None,
    dtype: Precision | None = None,
    pad_id: int | None = None,
) -> list[Path]:
    """Write a reward model that `AutoModelForSequenceClassification` loads.

    Args:
      directory: to be made; may exist, empty.
      params: {"backbone": parameters, "head": those of a head with one layer and one output}.
      config: of the backbone.
      source, dtype: as for `save_model`.
      pad_id: token of padding, which must not end texts: `transformers` scores the last token that is another one.

    Returns:
      the files written.

    Raises:
      ValueError: for another head, a family without such a class, or what `save_model` refuses.
    """
    head = params["head"]
    if set(head) != {"weight"} or head["weight"].shape[-1] != 1:
        raise ValueError(
            f"the head has {', '.join(sorted(head))} and {head['weight'].shape[-1]} outputs; transformers has a place "
            "for one layer with one output (head: scalar)"
        )
    return save_model(
        directory, params["backbone"], config, source=source, dtype=dtype, score=head["weight"].T, pad_id=pad_id
    )
