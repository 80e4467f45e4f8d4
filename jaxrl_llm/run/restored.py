"""A policy read back from where it lies: a run, one of its checkpoints, or a model directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree

from jaxrl_llm import data, hub
from jaxrl_llm.config import ConfigError, load_config
from jaxrl_llm.data import CharacterTokenizer, Tokenizer
from jaxrl_llm.models import weights
from jaxrl_llm.models.adapters import add_adapters
from jaxrl_llm.models.checkpoint_files import read_json
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.run import checkpoints, integrity, stored_states
from jaxrl_llm.run.directories import at_hand, is_run
from jaxrl_llm.run.setup import Parts, described_policy, parts
from jaxrl_llm.run.staged import last_stage
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.networks import POLICY, Network, given_shapes
from jaxrl_llm.training.segments import abstract_like, parameter_shardings


@dataclass(frozen=True)
class Policy:
    """What can be sampled from and scored with.

    Attributes:
      model: pure functions.
      params: their parameters.
      tokenizer: text <-> tokens.
      source: where it was read from.
      max_prompt_tokens: width of its run's prompts; None for a model directory.
      max_completion_tokens: longest completion, unless another is asked for.
      context_tokens: longest sequence that the model was made for; None where nothing says so.
    """

    model: Model
    params: PyTree
    tokenizer: Tokenizer
    source: Path
    max_prompt_tokens: int | None = None
    max_completion_tokens: int = 256
    context_tokens: int | None = None

    def for_context(self, tokens: int) -> Policy:
        """For sequences of at most so many tokens, on which rotary angles may depend; a run has settled that itself."""
        if self.max_prompt_tokens is not None or not isinstance(self.model.config, TransformerConfig):
            return self
        return replace(self, model=transformer(self.model.config.for_context(tokens)))


def restored_run(path: str | Path) -> tuple[Parts, Policy]:
    """The parts and the newest (or the named) policy of a run directory or checkpoint.

    Raises:
      ConfigError: when the run's config.yaml is not there.
      CheckpointError: when there is no checkpoint, or it does not fit the config.
    """
    built, folder, step = _parts_of(path)
    params = checkpoint_params(built, folder, step)
    widths = built.config.rollout.max_prompt_tokens, built.config.rollout.max_completion_tokens
    context = None if built.directory is None else _context_tokens(built.directory)
    return built, Policy(built.model, params, built.tokenizer, folder / str(step), *widths, context)


def checkpoint_params(built: Parts, folder: Path, step: int) -> PyTree:
    """The policy's parameters of one checkpoint of a run, where the parts' devices want them."""
    place = built.step.composition.resources.placement
    mesh, rules = place.mesh, place.rules
    if built.model.trained is None:
        shapes, device = (
            jax.eval_shape(built.model.init, jax.random.key(0)),
            SingleDeviceSharding(jax.local_devices()[0]),
        )
        one = jax.tree.map(lambda leaf: device, shapes)
        like = abstract_like(shapes, one if mesh is None else parameter_shardings(built.model, mesh, rules))
    else:  # what adapters are added to is not in the checkpoint
        like = built.initial_params(jax.random.key(built.config.seed))
    return stored_states.restore_params(folder, step, like, trained=built.model.trained)


def run_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run directory or checkpoint; no parameters are read for it."""
    folder = Path(path) if (Path(path) / "config.yaml").is_file() else Path(path).parent.parent
    config = load_config(folder / "config.yaml", ["mesh=auto"], vocabulary_size=CharacterTokenizer().vocabulary_size)
    return described_policy(config, planned=True)[1]


def _parts_of(path: str | Path, network: str = POLICY) -> tuple[Parts, Path, int]:
    """(parts of the last stage of a run, its checkpoints directory, the step that is meant)."""
    folder, step = integrity.latest_checkpoint(path, within=f"networks/{network}/params/")
    stored = folder.parent / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"{stored} is missing: a checkpoint is read with the config.yaml of its run beside it")
    # The machine that reads a checkpoint need not be the one that it was written on.
    here = ["mesh=auto", "training.offload=[]"]
    config = load_config(stored, here, vocabulary_size=CharacterTokenizer().vocabulary_size)
    return parts(last_stage(config), later=len(config.stages) > 1), folder, step


def branched_params(built: Parts, key: Array) -> PyTree:
    """The policy that `init_from` names, as parameters of this run's model.

    Args:
      built: of the run that starts.
      key: of adapters that are new.

    Raises:
      CheckpointError: when there is none, or its model is another.
    """
    source, policy = restored_run(_branch(built))
    return jax.jit(partial(_converted, source, built))(policy.params, key)


def require_branch(built: Parts) -> None:
    """Raises CheckpointError where `init_from` names no checkpoint, or one of another model; nothing is read for it."""
    source, _, _ = _parts_of(where := _branch(built))
    key = jax.random.key(0)
    made = jax.eval_shape(partial(_converted, source, built), jax.eval_shape(source.model.init, key), key)
    stored_states.require_same(made, jax.eval_shape(built.model.init, key), f"{where} of init_from")


def _branch(built: Parts) -> Path:
    branch = built.config.init_from
    assert branch is not None
    return integrity.branch_checkpoint(branch.path, branch.step)


def _converted(source: Parts, built: Parts, params: PyTree, key: Array) -> PyTree:
    """Parameters of one model as those of another: with other adapters, or none, and in other dtypes."""
    wanted, adapters = jax.eval_shape(built.model.init, key), built.config.lora
    if jax.tree.structure(params) != jax.tree.structure(wanted):
        params = params if source.model.trained is None else source.model.trained.merged(params)
        params = params if adapters is None else add_adapters(params, adapters, key, bits=adapters.bits)
    if jax.tree.structure(params) != jax.tree.structure(wanted):
        return params
    return jax.tree.map(lambda x, like: x if x.shape != like.shape else x.astype(like.dtype), params, wanted)


def restored_network(path: str | Path, name: str) -> tuple[Model, Network, PyTree]:
    """(model, description, parameters) of a network of a run's newest checkpoint, as a run of another config reads it.

    Raises:
      ConfigError: when the run's config.yaml is not there.
      CheckpointError: when there is no checkpoint, or it holds no network of this name.
    """
    built, folder, step = _parts_of(path, name)
    if name == POLICY:
        network, like = Network(), jax.eval_shape(built.model.init, jax.random.key(0))
    elif name in built.step.composition.networks:
        network = built.step.composition.networks[name]
        c = built.step.composition
        state = jax.eval_shape(partial(initial_state, c), jax.random.key(0), None, given_shapes(c.networks))
        like = state.networks[name].params
    else:
        known = ", ".join((POLICY, *built.step.composition.networks))
        raise checkpoints.CheckpointError(
            f"run {path} has no network {name!r}; it has {known}: name the one that is meant with `of`"
        )
    params = stored_states.restore_params(folder, step, like, network=name)
    return network.model or built.model, network, params


def restored_policy(path: str | Path, *, dtype: str | None = None, chat: bool = False) -> Policy:
    """The policy of a run, a checkpoint, or a model directory (or owner/name of a repository).

    Args:
      path: where it lies.
      dtype: to compute in, for a model directory; None takes the stored one.
      chat: prompts of a model directory go through its chat template.

    Raises:
      ValueError: when there is no model, or an option that a run decides by itself.
    """
    path = at_hand(path)
    if is_run(path):
        if dtype is not None or chat:
            raise ValueError(
                f"{path} is a run, whose config says its dtypes and prompts; leave out "
                f"{'--chat' if chat else '--dtype'}, or export it and name the directory"
            )
        return restored_run(path)[1]
    directory = hub.model_directory(path)
    execution: dict[str, Any] = {} if dtype is None else {"parameter_dtype": dtype, "compute_dtype": dtype}
    model, params = weights.load_model(directory, **execution)
    tokenizer = data.load_tokenizer(directory)
    data.require_embedding(tokenizer, model.vocabulary_size)
    tokenizer = data.with_chat(tokenizer) if chat else tokenizer
    return Policy(model, params, tokenizer, directory, context_tokens=_context_tokens(directory))


def _context_tokens(directory: Path) -> int | None:
    """What config.json says, or what rotary angles that are stretched reach, whichever is more."""
    config = read_json(directory / "config.json")
    config = config.get("text_config") or config
    stretched = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor, original = stretched.get("factor"), stretched.get("original_max_position_embeddings")
    reached = int(factor * original) if factor and original else 0
    return max(config.get("max_position_embeddings") or 0, reached) or None
