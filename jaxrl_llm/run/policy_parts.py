"""The policy that a config describes: its model, tokenizer and place on the devices, without the functions of a step.

This is enough to sample from a run, evaluate it and export it, where the functions of its training are not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jaxtyping import Array, PyTree

from jaxrl_llm import data
from jaxrl_llm.config import Config, PretrainedConfig
from jaxrl_llm.data import CharacterTokenizer, Task, Tokenizer
from jaxrl_llm.experience import KeyUse
from jaxrl_llm.hub import model_directory
from jaxrl_llm.models import weights
from jaxrl_llm.models.adapters import add_adapters, lora
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import parameter_count
from jaxrl_llm.parallel import changed_rules
from jaxrl_llm.run.machine import Target, chosen_mesh
from jaxrl_llm.run.problems import configured_task
from jaxrl_llm.training import Placement
from jaxrl_llm.training.segments import parameter_shardings

_MOST_PARAMETERS = 10**14


@dataclass(frozen=True)
class PolicyParts:
    """The policy of a config, before its parameters are made or read.

    Attributes:
      config: the run's config.
      task: the problem family with its options; None for a user's data set.
      tokenizer: text <-> tokens.
      model: the policy.
      directory: the checkpoint that the policy starts from; None for random parameters.
      placement: devices and shardings.
      mesh_reason: why the mesh has its sizes, as text.
    """

    config: Config
    task: Task | None
    tokenizer: Tokenizer
    model: Model
    directory: Path | None
    placement: Placement
    mesh_reason: str

    def initial_params(self, key: Array) -> PyTree:
        """The initial parameters of a run with this key: from another run, from a checkpoint, or random.

        Adapters are always initialised at random, unless they come from another run.
        """
        key, adapters = jax.random.fold_in(key, KeyUse.INITIALISE), self.config.lora
        c = self.placement
        shardings = None if c.mesh is None else parameter_shardings(self.model, c.mesh, c.rules)
        if self.config.init_from is not None:
            from jaxrl_llm.run.restored import branched_params  # imports this module

            params = branched_params(self, key)
            return params if shardings is None else jax.device_put(params, shardings)
        if self.directory is None:
            return jax.jit(self.model.init, out_shardings=shardings)(key)
        strict = isinstance(self.config.model, PretrainedConfig) and self.config.model.strict
        if adapters is None:
            return weights.load_params(self.directory, self.model.config, sharding=shardings, strict=strict)
        base = None if c.mesh is None else parameter_shardings(transformer(self.model.config), c.mesh, c.rules)
        params = weights.load_params(self.directory, self.model.config, sharding=base, strict=strict)
        adapted = add_adapters(params, adapters, key, bits=adapters.bits)
        return adapted if shardings is None else jax.device_put(adapted, shardings)


def policy_parts(config: Config, target: Target | None = None, like: PolicyParts | None = None) -> PolicyParts:
    """The policy of a config.

    Args:
      config: of a run, or of one of its stages.
      target: the machine to plan for; a model directory then needs only its config.json.
      like: of another stage, whose tokenizer, model and mesh are reused.

    Raises:
      ValueError: for an unknown task, a model that cannot be read, or a mesh that does not fit the devices.
    """
    task = None if config.task is None else configured_task(config.task)
    if like is None:
        directory, tokenizer, model = described_policy(config, planned=target is not None)
        if config.lora is not None:
            model = lora(model, config.lora, bits=config.lora.bits)
        mesh, reason = chosen_mesh(config, model, target)
    else:
        directory, tokenizer, model = like.directory, like.tokenizer, like.model
        mesh, reason = like.placement.mesh, like.mesh_reason
    rules, offload = changed_rules(config.mesh.rules), frozenset(config.training.offload)
    placement = Placement(mesh, rules, config.mesh.gather_for_rollout, offload)
    return PolicyParts(config, task, tokenizer, model, directory, placement, reason)


def longest_sequence(config: Config) -> int:
    """Tokens of the longest sequence of a run."""
    return config.rollout.max_prompt_tokens + config.rollout.max_completion_tokens


def require_context(config: Config, directory: Path | None) -> None:
    """Raise ValueError for sequences beyond the context that the model of a config is made for."""
    limit, rollout = None if directory is None else weights.longest_context(directory), config.rollout
    if limit is not None and longest_sequence(config) > limit:
        raise ValueError(
            f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} and rollout.max_completion_tokens "
            f"{rollout.max_completion_tokens} make sequences of {longest_sequence(config)} tokens, more than the "
            f"model's context of {limit} tokens; lower one of them (a model that reads longer ones well says so in "
            "max_position_embeddings of its config.json)"
        )


def described_policy(config: Config, *, planned: bool = False) -> tuple[Path | None, Tokenizer, Model]:
    """(checkpoint directory or None, tokenizer, model) of a config; no weights are read."""
    context = longest_sequence(config)
    if not isinstance(config.model, PretrainedConfig):
        tokenizer = CharacterTokenizer()
        if config.model.vocabulary_size < tokenizer.vocabulary_size:
            raise ValueError(
                f"model.vocabulary_size is {config.model.vocabulary_size}, but the tokenizer has "
                f"{tokenizer.vocabulary_size} tokens; remove the field to use that number"
            )
        model = transformer(replace(config.model.for_context(context), remat=config.training.remat))
        if (count := parameter_count(model.specs)) > _MOST_PARAMETERS:
            raise ValueError(
                f"section model describes {count:,} parameters, more than {_MOST_PARAMETERS:,}; lower sizes"
            )
        return None, tokenizer, model
    directory = model_directory(config.model.path, revision=config.model.revision, weights=not planned)
    described = weights.load_config(directory, context_tokens=context, **config.model.execution)
    model = transformer(replace(described, remat=config.training.remat))
    prompts = config.data
    if planned and not (directory / "tokenizer.json").is_file():
        return directory, CharacterTokenizer(), model  # sizes do not depend on the tokenizer
    tokenizer = data.load_tokenizer(directory)
    data.require_embedding(tokenizer, model.vocabulary_size)
    if prompts.prompts == "plain":
        return directory, data.with_prompt_format(tokenizer, prompts.prompt_format), model
    chat = data.with_chat(
        tokenizer,
        system_prompt=prompts.system_prompt,
        format=prompts.prompt_format,
        options=prompts.template_options,
        rewritten_history=prompts.rewritten_history,
    )
    return directory, chat, model
