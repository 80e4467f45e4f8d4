"""Import and export of reward models of Hugging Face: `*ForSequenceClassification` with one label.

The score of a text is the output of the head at its last token. Here the last token follows from the row's length; in
`transformers` it is the last token that is not padding.
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
    """(the backbone, {"backbone": its parameters, "head": {"weight": [D, 1]}}), the arguments of `sequence_reward`.

    Args:
      directory: config.json and safetensors files.
      execution: options as for `load_model`.

    Raises:
      FileNotFoundError: for a missing path or file.
      ValueError: for a model of another kind, without a head or with several labels, or tensors that do not fit.
    """
    model = transformer(load_config(directory, scores=True, **execution))
    return model, load_reward_params(directory, model.config)


def load_reward_params(directory: str | Path, config: TransformerConfig) -> PyTree:
    """The parameters of a reward model, as returned by `load_reward_model`."""
    stored = stored_tensors(directory)
    if SCORE not in stored:
        raise ValueError(
            f"{directory} is a reward model by its config.json, but has no {SCORE}; copy the files again, or train a "
            "head: networks.reward.head=scalar"
        )
    if (shape := stored[SCORE].shape) != (1, config.width):
        raise ValueError(
            f"{directory} has a head {SCORE} with {shape[0]} labels and input width {shape[-1]}; a reward model needs "
            f"one label and input width {config.width}"
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
      directory: a new or empty directory.
      params: {"backbone": parameters, "head": those of a head with one layer and one output}.
      config: of the backbone.
      source, dtype: as for `save_model`.
      pad_id: padding token, which must not be the last token of a text: `transformers` scores the last token that is
        not padding.

    Returns:
      the files written.

    Raises:
      ValueError: for another kind of head, a family without such a class, or input that `save_model` refuses.
    """
    head = params["head"]
    if set(head) != {"weight"} or head["weight"].shape[-1] != 1:
        raise ValueError(
            f"the head has {', '.join(sorted(head))} and {head['weight'].shape[-1]} outputs; transformers supports one "
            "layer with one output (head: scalar)"
        )
    return save_model(
        directory, params["backbone"], config, source=source, dtype=dtype, score=head["weight"].T, pad_id=pad_id
    )
