"""A policy restored from a run, from one of its checkpoints, or from a model directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree

from jaxrl_llm import data, hub
from jaxrl_llm.config import Config, ConfigError, load_config
from jaxrl_llm.data import CharacterTokenizer, Tokenizer
from jaxrl_llm.models import weights
from jaxrl_llm.models.adapters import add_adapters
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.run import checkpoints, integrity, stored_states
from jaxrl_llm.run.directories import at_hand, is_run
from jaxrl_llm.run.policy_parts import PolicyParts, described_policy, policy_parts
from jaxrl_llm.run.setup import parts
from jaxrl_llm.run.staged import last_stage
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.networks import POLICY, Network, given_shapes
from jaxrl_llm.training.segments import abstract_like, parameter_shardings


@dataclass(frozen=True)
class Policy:
    """A model with its parameters and tokenizer, for sampling and for log-probabilities.

    Attributes:
      model: pure functions.
      params: their parameters.
      tokenizer: text <-> tokens.
      source: the directory that it was read from.
      max_prompt_tokens: longest prompt of its run; None for a model directory.
      max_completion_tokens: default of the longest completion.
      context_tokens: longest sequence that the model supports; None if unknown.
    """

    model: Model
    params: PyTree
    tokenizer: Tokenizer
    source: Path
    max_prompt_tokens: int | None = None
    max_completion_tokens: int = 256
    context_tokens: int | None = None

    def for_context(self, tokens: int) -> Policy:
        """The policy for sequences of at most `tokens` tokens, on which scaled rotary angles may depend.

        The policy of a run is returned unchanged: its config sets this length.
        """
        if self.max_prompt_tokens is not None or not isinstance(self.model.config, TransformerConfig):
            return self
        return replace(self, model=transformer(self.model.config.for_context(tokens)))


def restored_run(path: str | Path) -> tuple[PolicyParts, Policy]:
    """The policy of a run, from the newest checkpoint of a run directory or from one checkpoint.

    Functions that the run is trained with are not needed.

    Raises:
      ConfigError: if the run's config.yaml is missing.
      CheckpointError: if there is no checkpoint, or it does not fit the config.
    """
    config, folder, step = _config_of(path)
    built = policy_parts(last_stage(config))
    params = checkpoint_params(built, folder, step)
    widths = built.config.rollout.max_prompt_tokens, built.config.rollout.max_completion_tokens
    context = None if built.directory is None else weights.longest_context(built.directory)
    return built, Policy(built.model, params, built.tokenizer, folder / str(step), *widths, context)


def checkpoint_params(built: PolicyParts, folder: Path, step: int) -> PyTree:
    """The policy's parameters of one checkpoint of a run, sharded over the mesh of the parts."""
    mesh, rules = built.placement.mesh, built.placement.rules
    if built.model.trained is None:
        shapes, device = (
            jax.eval_shape(built.model.init, jax.random.key(0)),
            SingleDeviceSharding(jax.local_devices()[0]),
        )
        one = jax.tree.map(lambda leaf: device, shapes)
        like = abstract_like(shapes, one if mesh is None else parameter_shardings(built.model, mesh, rules))
    else:  # the checkpoint has the adapters but not the base model
        like = built.initial_params(jax.random.key(built.config.seed))
    return stored_states.restore_params(folder, step, like, trained=built.model.trained)


def run_config(path: str | Path) -> Config:
    """The config of a run directory or checkpoint, which may be read on another machine than the one that wrote it.

    Raises:
      ConfigError: if there is none.
    """
    folder = Path(path) if (Path(path) / "config.yaml").is_file() else Path(path).parent.parent
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"{stored} is missing: restoring a checkpoint needs the config.yaml of its run")
    here = ["mesh=auto", "training.offload=[]"]
    return load_config(stored, here, vocabulary_size=CharacterTokenizer().vocabulary_size)


def run_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run directory or checkpoint; reads no parameters."""
    return described_policy(run_config(path), planned=True)[1]


def _config_of(path: str | Path, network: str = POLICY) -> tuple[Config, Path, int]:
    """(config of a run, its checkpoints directory, the step of the checkpoint)."""
    folder, step = integrity.latest_checkpoint(path, within=f"networks/{network}/params/")
    return run_config(folder / str(step)), folder, step


def branched_params(built: PolicyParts, key: Array) -> PyTree:
    """The policy of the checkpoint in `init_from`, converted to this run's model.

    Args:
      built: the parts of the new run.
      key: for the initial values of new adapters.

    Raises:
      CheckpointError: if there is no checkpoint, or it has another model.
    """
    source, policy = restored_run(_branch(built))
    return jax.jit(partial(_converted, source, built))(policy.params, key)


def require_branch(built: PolicyParts) -> None:
    """Raises CheckpointError if `init_from` is not a checkpoint of this model; reads no parameters."""
    source = policy_parts(last_stage(_config_of(where := _branch(built))[0]))
    key = jax.random.key(0)
    made = jax.eval_shape(partial(_converted, source, built), jax.eval_shape(source.model.init, key), key)
    stored_states.require_same(made, jax.eval_shape(built.model.init, key), f"{where} of init_from")


def _branch(built: PolicyParts) -> Path:
    branch = built.config.init_from
    assert branch is not None
    return integrity.branch_checkpoint(branch.path, branch.step)


def _converted(source: PolicyParts, built: PolicyParts, params: PyTree, key: Array) -> PyTree:
    """Parameters of one model converted to another: adapters are merged or added, and dtypes change."""
    wanted, adapters = jax.eval_shape(built.model.init, key), built.config.lora
    if jax.tree.structure(params) != jax.tree.structure(wanted):
        params = params if source.model.trained is None else source.model.trained.merged(params)
        params = params if adapters is None else add_adapters(params, adapters, key, bits=adapters.bits)
    if jax.tree.structure(params) != jax.tree.structure(wanted):
        return params
    return jax.tree.map(lambda x, like: x if x.shape != like.shape else x.astype(like.dtype), params, wanted)


def restored_network(path: str | Path, name: str) -> tuple[Model, Network, PyTree]:
    """(model, description, parameters) of a network in a run's newest checkpoint, for use in another run.

    Raises:
      ConfigError: if the run's config.yaml is missing.
      CheckpointError: if there is no checkpoint, or it has no network of this name.
    """
    config, folder, step = _config_of(path, name)
    if name == POLICY:
        model = policy_parts(last_stage(config)).model
        network, like = Network(), jax.eval_shape(model.init, jax.random.key(0))
        return model, network, stored_states.restore_params(folder, step, like, network=name)
    built = parts(last_stage(config), later=len(config.stages) > 1)
    c = built.step.composition
    if name not in c.networks:
        known = ", ".join((POLICY, *c.networks))
        raise checkpoints.CheckpointError(
            f"run {path} has no network {name!r}; its networks are {known} (`networks.NAME.of` names one)"
        )
    network = c.networks[name]
    state = jax.eval_shape(partial(initial_state, c), jax.random.key(0), None, given_shapes(c.networks))
    params = stored_states.restore_params(folder, step, state.networks[name].params, network=name)
    return network.model or built.model, network, params


def restored_policy(path: str | Path, *, dtype: str | None = None, chat: bool = False) -> Policy:
    """The policy of a run, of a checkpoint, or of a model directory (or owner/name of a repository).

    Args:
      path: the run, the checkpoint or the model directory.
      dtype: for parameters and computation, for a model directory; None uses the stored dtype.
      chat: apply the chat template of a model directory to prompts.

    Raises:
      ValueError: if there is no model, or if `dtype` or `chat` is set for a run, whose config has these options.
    """
    path = at_hand(path)
    if is_run(path):
        if dtype is not None or chat:
            raise ValueError(
                f"{path} is a run, whose config sets dtypes and prompts; remove {'--chat' if chat else '--dtype'}, or "
                "export the run and give the exported directory"
            )
        return restored_run(path)[1]
    directory = hub.model_directory(path)
    execution: dict[str, Any] = {} if dtype is None else {"parameter_dtype": dtype, "compute_dtype": dtype}
    model, params = weights.load_model(directory, **execution)
    tokenizer = data.load_tokenizer(directory)
    data.require_embedding(tokenizer, model.vocabulary_size)
    tokenizer = data.with_chat(tokenizer) if chat else tokenizer
    return Policy(model, params, tokenizer, directory, context_tokens=weights.longest_context(directory))
