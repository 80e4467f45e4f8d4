"""From a config to the parts of a run: model, tokenizer, data sets, optimiser and the composed step."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree

from jaxrl_llm import data
from jaxrl_llm.config import Config, PretrainedConfig
from jaxrl_llm.data import Batches, CharacterTokenizer, DataSet, DataSpec, JsonlDataSet, Task, Tokenizer
from jaxrl_llm.data.buckets import buckets
from jaxrl_llm.data.jsonl import SPLITS
from jaxrl_llm.evaluation import Grader, file_grader, task_grader
from jaxrl_llm.experience import KeyUse, Method, Prompts
from jaxrl_llm.hub import model_directory
from jaxrl_llm.models import weights
from jaxrl_llm.models.lora import add_adapters, lora
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer import transformer
from jaxrl_llm.parallel import changed_rules
from jaxrl_llm.rollout.host_calls import Caller
from jaxrl_llm.rollout.host_environments import HostEnvironment, opened
from jaxrl_llm.rollout.round_options import Adaptive, Budget, Refill
from jaxrl_llm.run.configured import configured_environment
from jaxrl_llm.run.machine import Target, chosen_mesh
from jaxrl_llm.run.recipes import credit_terms, loss_terms, number_or_method, reward_terms
from jaxrl_llm.training.composition import Rollout
from jaxrl_llm.training.conversations import AnyEnvironment
from jaxrl_llm.training.critics import Critic
from jaxrl_llm.training.external_engine import external_engine
from jaxrl_llm.training.learn import Update
from jaxrl_llm.training.optimizers import optimizer
from jaxrl_llm.training.placement import parameter_shardings
from jaxrl_llm.training.provide import FROM_DATA
from jaxrl_llm.training.rows import Extra
from jaxrl_llm.training.step import TrainStep, make_train_step
from jaxrl_llm.training.stored import Replay, StoredRows


@dataclass(frozen=True)
class Parts:
    """What a config describes, before any data is made or anything is compiled.

    Attributes:
      config: the run's config.
      task: the problem family with its options; None for a data set of the user's own.
      tokenizer: text <-> tokens.
      model: the policy.
      directory: the checkpoint that the policy starts from; None for random parameters.
      step: the composed training step.
      mesh_reason: why its mesh has the sizes that it has.
      call: calls the functions of an environment in Python, while it is `opened_parts`.
    """

    config: Config
    task: Task | None
    tokenizer: Tokenizer
    model: Model
    directory: Path | None
    step: TrainStep
    mesh_reason: str = ""
    call: Caller | None = None

    @property
    def environment(self) -> AnyEnvironment | None:
        """What answers the turns of conversations; None where one completion is all."""
        return self.step.composition.rollout.environment

    @property
    def scratchpad(self) -> bool:
        """Whether reference completions of generated problems show their work."""
        return self.task is None or self.task.scratchpad

    def initial_params(self, key: Array) -> PyTree:
        """The parameters that a run with this key starts from: the checkpoint's, or drawn; adapters always are."""
        key, c, adapters = jax.random.fold_in(key, KeyUse.INITIALISE), self.step.composition, self.config.lora
        lies = None if c.mesh is None else parameter_shardings(self.model, c.mesh, c.rules)
        if self.directory is None:
            return jax.jit(self.model.init, out_shardings=lies)(key)
        if adapters is None:
            return weights.load_params(self.directory, self.model.config, sharding=lies)
        base = None if c.mesh is None else parameter_shardings(transformer(self.model.config), c.mesh, c.rules)
        params = weights.load_params(self.directory, self.model.config, sharding=base)
        adapted = add_adapters(params, adapters, key, quantise=adapters.int8)
        return adapted if lies is None else jax.device_put(adapted, lies)

    def fingerprint(self) -> dict[str, str]:
        """What a resumed run must find unchanged beside its data: hashes of tokenizer and checkpoint files."""
        if self.directory is None or not isinstance(self.tokenizer, data.HuggingFaceTokenizer):
            return {}
        # Sizes, not contents: a checkpoint is too large to be read for this.
        files = [(file.name, file.stat().st_size) for file in sorted(self.directory.glob("*.safetensors"))]
        described = (self.directory / "config.json").read_text() + repr(files)
        return {"tokenizer": self.tokenizer.fingerprint, "model": hashlib.sha256(described.encode()).hexdigest()}


def parts(config: Config, target: Target | None = None) -> Parts:
    """Build and check everything that needs no data.

    Args:
      config: of a run.
      target: a machine that is planned for: of a checkpoint, its config.json is enough then.

    Raises:
      ValueError: for an unknown task or method, a name that nothing provides, or sizes that do not divide.
    """
    task = None if config.task is None else data.tasks.task(config.task.name, **config.task.options)
    directory, tokenizer, model = _policy(config, planned=target is not None)
    if config.lora is not None:
        model = lora(model, config.lora, quantise=config.lora.int8)
    training = config.training
    update = Update(
        epochs_per_batch=training.epochs_per_batch,
        minibatches_per_epoch=training.minibatches_per_epoch,
        sequences_per_microbatch=training.sequences_per_microbatch,
        refresh_reference_every=training.refresh_reference_every,
        refresh_reference_at=training.refresh_reference_at,
        reference_decay=training.reference_decay,
        # Adapters that a warm start has trained are part of where reinforcement begins.
        snapshot_reference=config.lora is not None and config.warm_start.steps > 0,
        freeze_policy_steps=training.freeze_policy_steps,
        alignment_every_steps=training.alignment_every_steps,
        alignment_learning_rate=training.learning_rate,
    )
    rollout = Rollout(
        samples_per_prompt=config.rollout.samples_per_prompt,
        max_completion_tokens=config.rollout.max_completion_tokens,
        eos_ids=tuple(tokenizer.eos_ids),
        pad_id=tokenizer.pad_id,
        temperature=config.rollout.temperature,
        demonstration_in_group=config.rollout.demonstration_in_group,
        prefixes=tuple(tuple(tokenizer.encode(text)) for text in config.rollout.prefixes),
        extra=_extra(config),
        replay_router=config.rollout.replay_router,
        slots=config.rollout.slots,
        rounds=_rounds(config),
        truncation=config.rollout.truncation,
        off_policy_steps=config.rollout.off_policy_steps,
        environment=_environment(config, task, tokenizer),
    )
    mesh, reason = chosen_mesh(config, model, target)
    rewards, credit, losses = reward_terms(config.rewards), credit_terms(config.credit), loss_terms(config.losses)
    if not isinstance(tokenizer, CharacterTokenizer):
        _require_own_ids([(term.name, term.function) for term in (*rewards, *credit, *losses)])
    step = make_train_step(
        model,
        optimizer(config.training, seed=config.seed),
        rollout=rollout,
        rewards=rewards,
        credit=credit,
        losses=losses,
        update=update,
        prompts_per_step=training.prompts_per_step,
        decode=tokenizer.decode,
        mesh=mesh,
        rules=changed_rules(config.mesh.rules),
        gather_for_rollout=config.mesh.gather_for_rollout,
        offload=config.training.offload,
        encode=tokenizer.encode,
        critic=_critic(config),
        stored=_stored(config),
        replay=_replay(config),
        external=external_engine(config.rollout.engine, model, directory),
    )
    return Parts(config, task, tokenizer, model, directory, step, reason)


@contextmanager
def opened_parts(built: Parts) -> Iterator[Parts]:
    """The parts with their environment open, for the length of a run; as they are, unless it is one in Python."""
    if not isinstance(built.environment, HostEnvironment):
        yield built
        return
    with opened(built.environment) as call:
        yield replace(built, call=call, step=replace(built.step, run=partial(built.step.run, call=call)))


def _policy(config: Config, *, planned: bool = False) -> tuple[Path | None, Tokenizer, Model]:
    """(checkpoint directory or None, tokenizer, model)."""
    if not isinstance(config.model, PretrainedConfig):
        tokenizer = CharacterTokenizer()
        if config.model.vocabulary_size < tokenizer.vocabulary_size:
            raise ValueError(
                f"model.vocabulary_size is {config.model.vocabulary_size}, but the tokenizer has "
                f"{tokenizer.vocabulary_size} tokens; leave the field out to have it filled in"
            )
        return None, tokenizer, transformer(replace(config.model, remat=config.training.remat))
    directory = model_directory(config.model.path, revision=config.model.revision, weights=not planned)
    model = transformer(replace(weights.load_config(directory, **config.model.execution), remat=config.training.remat))
    prompts = config.data
    if planned and not (directory / "tokenizer.json").is_file():
        return directory, CharacterTokenizer(), model  # which tokens there are decides no size
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


def _require_own_ids(functions: Sequence[tuple[str, Any]]) -> None:
    """Refuse functions that would look for the built-in tokenizer's ids in another tokenizer's tokens."""
    for name, function in functions:
        bound: dict[str, Any] = {}
        if isinstance(function, Method):
            function = function.update
        if isinstance(function, partial):
            bound, function = function.keywords, function.func
        for parameter in inspect.signature(function).parameters.values():
            looks = parameter.kind is parameter.KEYWORD_ONLY and parameter.name.endswith(("_id", "_ids"))
            if looks and parameter.name not in bound and parameter.default not in (None, parameter.empty):
                raise ValueError(
                    f"{name} looks for token ids of the built-in tokenizer ({parameter.name} is {parameter.default}), "
                    "but the model at model.path has a tokenizer of its own; set the ids, or use a function that reads "
                    "text, such as number_match"
                )


def _environment(config: Config, task: Task | None, tokenizer: Tokenizer) -> AnyEnvironment | None:
    environment = configured_environment(config.environment, task, tokenizer)
    if environment is not None and config.rehearsal is not None:
        raise ValueError(
            "rehearsal is set, but the task is answered in turns by an environment; leave it out, or choose a task of "
            "one completion"
        )
    return environment


def _rounds(config: Config) -> Refill | Adaptive | Budget | None:
    rounds = config.rollout.rounds
    if not isinstance(rounds, Budget) or rounds.prompt_ids is not None:
        return rounds
    if config.task is None:
        raise ValueError(
            "rollout.budget remembers the success of each prompt of data.path: set rollout.budget.prompt_ids to the "
            "number of its records"
        )
    return replace(rounds, prompt_ids=config.task.train_items)


def prompts_handed(config: Config) -> int:
    """Prompts that a step is handed: more than it learns from where groups are refilled."""
    refill = config.rollout.refill
    return config.training.prompts_per_step * (1 if refill is None else refill.max_rounds)


def prompt_widths(config: Config) -> tuple[int, ...]:
    """Widths that the prompts of a step may have, in ascending order; each one that occurs is a program of its own."""
    rollout = config.rollout
    if rollout.prompt_buckets is True:
        return buckets(rollout.max_prompt_tokens)
    return tuple(sorted({*(rollout.prompt_buckets or ()), rollout.max_prompt_tokens}))


def _extra(config: Config) -> Extra | None:
    extra = config.rollout.extra
    if extra is None:
        return None
    return Extra(extra.prompt_share, number_or_method(extra.temperature, "rollout.extra.temperature"))


def _critic(config: Config) -> Critic:
    critic = config.critic
    learner = optax.chain(
        optax.clip_by_global_norm(critic.max_gradient_norm),
        optax.adamw(critic.learning_rate, b1=config.training.adam_b1, b2=config.training.adam_b2, weight_decay=0.0),
    )
    return Critic(learner, critic.backbone, critic.target_rate)


def _stored(config: Config) -> StoredRows | None:
    samples = config.rollout.samples_per_prompt
    if config.rehearsal:
        return StoredRows(config.rehearsal.sequences_per_step // samples, frozenset({"stored_logprobs"}))
    if config.supervised:
        groups = config.supervised.sequences_per_step // samples
        # As many rows of the validation split again, where a validation loss is asked for.
        validated = config.training.alignment_every_steps > 0
        return StoredRows(2 * groups, frozenset({"validation"})) if validated else StoredRows(groups)
    return None


def _replay(config: Config) -> Replay | None:
    replay, rollout = config.replay, config.rollout
    if replay is None:
        return None
    return Replay(
        share=replay.share,
        batches=replay.batches,
        prompts_per_step=config.training.prompts_per_step,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_answer_tokens=rollout.max_completion_tokens,
        until_step=replay.until_step,
    )


def data_directory(config: Config) -> Path:
    """Where data sets are kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(config.data.directory) if config.data.directory else cache / "jaxrl_llm" / "data"


def data_sets(config: Config, splits: Sequence[str] = SPLITS) -> dict[str, DataSet | JsonlDataSet]:
    """The problems of splits, by name; generated ones are written on first use, and those of `splits` alone.

    Raises:
      ValueError: for a file that cannot be used.
    """
    task, own = config.task, config.data
    if own.path is not None:
        fields = data.fields_of(own.format, **own.fields)
        sets = data.jsonl_data_sets(own.path, fields, validation_path=own.validation_path, test_path=own.test_path)
        return {split: sets[split] for split in splits}
    assert task is not None  # Config holds one or the other
    counts = {"train": task.train_items, "validation": task.validation_items, "test": task.test_items}
    return {
        split: data.data_set(
            DataSpec(task.name, task.levels, split, counts[split], task.seed, task.options), str(data_directory(config))
        )
        for split in splits
    }


def grader(parts: Parts, *held_out: DataSet | JsonlDataSet) -> Grader:
    """How evaluation grades problems of these sets.

    Raises:
      ValueError: where their reference answers cannot be graded so.
    """
    if parts.task is not None:
        return task_grader(parts.task)
    return file_grader(parts.config.data.verifier, [record for each in held_out for record in each])


def prompt_batches(parts: Parts, source: Sequence[Any]) -> Batches:
    """Batches of training prompts, with reference completions where the step wants them; the position is the step."""
    config, rollout = parts.config, parts.config.rollout
    with_demonstrations = bool(parts.step.composition.wanted & FROM_DATA)
    rounds = parts.step.composition.rollout.rounds
    if isinstance(rounds, Budget) and rounds.prompt_ids is not None:
        largest = max(int(source[index]["item_id"]) for index in range(len(source)))
        if largest >= rounds.prompt_ids:
            raise ValueError(
                f"rollout.budget.prompt_ids is {rounds.prompt_ids}, but a prompt has the id {largest}; set it to at "
                f"least {largest + 1}"
            )
    if with_demonstrations and parts.task is not None and parts.task.segments is not None:
        raise ValueError(
            f"the recipe learns from reference completions, but those of task {parts.task.name!r} are conversations, "
            "whose observations nobody wrote; use warm_start, which leaves them out, or a task of one completion"
        )
    return data.prompt_batches(
        source,
        parts.tokenizer,
        prompts_per_step=prompts_handed(config),
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_answer_tokens=rollout.max_completion_tokens,
        seed=config.seed,
        overlong=config.data.overlong_prompts,
        max_demonstration_tokens=rollout.max_completion_tokens if with_demonstrations else None,
        scratchpad=parts.scratchpad,
        widths=prompt_widths(config),
    )


def encoded(parts: Parts, source: Sequence[Any]) -> Prompts:
    """All prompts of a split, in order.

    Raises:
      ValueError: for a prompt that is too long, unless the config drops those.
    """
    config = parts.config
    return data.encode_prompts(
        source,
        parts.tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_answer_tokens=config.rollout.max_completion_tokens,
        overlong=config.data.overlong_prompts,
    )


def demonstration_batches(parts: Parts, source: Sequence[Any], sequences_per_step: int) -> Batches:
    """Batches of reference completions."""
    config = parts.config
    return data.supervised_batches(
        source,
        parts.tokenizer,
        sequences_per_step=sequences_per_step,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        seed=config.seed,
        scratchpad=parts.scratchpad,
        overlong=config.data.overlong_prompts,
        segments=None if parts.task is None else parts.task.segments,
    )
