"""From a config to the parts of a run: task, tokenizer, model, data sets, optimiser and the composed step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optax

from jaxrl_llm import data
from jaxrl_llm.config import Config, TrainingConfig
from jaxrl_llm.data import Batches, CharacterTokenizer, DataSet, DataSpec, Task
from jaxrl_llm.experience import Prompts
from jaxrl_llm.models.lora import lora
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer import transformer
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.training.critics import Critic
from jaxrl_llm.training.learn import Update
from jaxrl_llm.training.provide import FROM_DATA
from jaxrl_llm.training.recipes import credit_terms, loss_terms, number_or_method, reward_terms
from jaxrl_llm.training.rows import Extra
from jaxrl_llm.training.step import Rollout, TrainStep, make_train_step
from jaxrl_llm.training.stored import Replay, StoredRows


@dataclass(frozen=True)
class Parts:
    """What a config describes, before any data is made or anything is compiled.

    Attributes:
      config: the run's config.
      task: the problem family with its options.
      tokenizer: text <-> tokens.
      model: the policy.
      step: the composed training step.
    """

    config: Config
    task: Task
    tokenizer: CharacterTokenizer
    model: Model
    step: TrainStep


def parts(config: Config) -> Parts:
    """Build and check everything that needs no data.

    Raises:
      ValueError: for an unknown task or method, a name that nothing provides, or sizes that do not divide.
    """
    task = data.tasks.task(config.task.name, **config.task.options)
    tokenizer = CharacterTokenizer()
    if config.model.vocabulary_size < tokenizer.vocabulary_size:
        raise ValueError(
            f"model.vocabulary_size is {config.model.vocabulary_size}, but the tokenizer has "
            f"{tokenizer.vocabulary_size} tokens; leave the field out to have it filled in"
        )
    model = transformer(config.model)
    if config.lora is not None:
        model = lora(model, config.lora, quantise=config.lora.int8)
    optimizer = adamw(config.training)
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
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        temperature=config.rollout.temperature,
        demonstration_in_group=config.rollout.demonstration_in_group,
        prefixes=tuple(tuple(tokenizer.encode(text)) for text in config.rollout.prefixes),
        extra=_extra(config),
    )
    mesh = make_mesh(config.mesh.devices)
    step = make_train_step(
        model,
        optimizer,
        rollout=rollout,
        rewards=reward_terms(config.rewards),
        credit=credit_terms(config.credit),
        losses=loss_terms(config.losses),
        update=update,
        prompts_per_step=training.prompts_per_step,
        decode=tokenizer.decode,
        mesh=mesh if mesh.size > 1 else None,
        critic=_critic(config),
        stored=_stored(config),
        replay=_replay(config),
    )
    return Parts(config, task, tokenizer, model, step)


def _extra(config: Config) -> Extra | None:
    extra = config.rollout.extra
    if extra is None:
        return None
    return Extra(extra.prompt_share, number_or_method(extra.temperature, "rollout.extra.temperature"))


def _critic(config: Config) -> Critic:
    critic = config.critic
    optimizer = optax.chain(
        optax.clip_by_global_norm(critic.max_gradient_norm),
        optax.adamw(critic.learning_rate, b1=config.training.adam_b1, b2=config.training.adam_b2, weight_decay=0.0),
    )
    return Critic(optimizer, critic.backbone, critic.target_rate)


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


def adamw(training: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with global norm clipping and the schedule that the config asks for."""
    updates = training.steps * training.epochs_per_batch * training.minibatches_per_epoch
    peak, warmup = training.learning_rate, training.warmup_steps
    if training.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(updates - warmup, 1), alpha=0.1)
    else:
        after = optax.constant_schedule(peak)
    rate = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
    return optax.chain(
        optax.clip_by_global_norm(training.max_gradient_norm),
        optax.adamw(rate, b1=training.adam_b1, b2=training.adam_b2, weight_decay=training.weight_decay),
    )


def data_directory(config: Config) -> Path:
    """Where data sets are kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(config.data.directory) if config.data.directory else cache / "jaxrl_llm" / "data"


def task_data(config: Config, split: str) -> DataSet:
    """The problems of one split, written on first use."""
    task = config.task
    count = {"train": task.train_items, "validation": task.validation_items, "test": task.test_items}[split]
    spec = DataSpec(task.name, task.levels, split, count, task.seed, task.options)
    return data.data_set(spec, str(data_directory(config)))


def prompt_batches(parts: Parts, source: Sequence[Any]) -> Batches:
    """Batches of training prompts, with reference completions where the step wants them; the position is the step."""
    config, rollout = parts.config, parts.config.rollout
    with_demonstrations = bool(parts.step.composition.wanted & FROM_DATA)
    return data.prompt_batches(
        source,
        parts.tokenizer,
        prompts_per_step=config.training.prompts_per_step,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_answer_tokens=rollout.max_completion_tokens,
        seed=config.seed,
        overlong=config.data.overlong_prompts,
        max_demonstration_tokens=rollout.max_completion_tokens if with_demonstrations else None,
        scratchpad=parts.task.scratchpad,
    )


def encoded(parts: Parts, source: DataSet) -> Prompts:
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


def demonstration_batches(parts: Parts, source: DataSet, sequences_per_step: int) -> Batches:
    """Batches of reference completions."""
    config = parts.config
    return data.supervised_batches(
        source,
        parts.tokenizer,
        sequences_per_step=sequences_per_step,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        seed=config.seed,
        scratchpad=parts.task.scratchpad,
        overlong=config.data.overlong_prompts,
    )
