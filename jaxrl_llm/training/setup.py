"""From a config to the parts of a run: task, tokenizer, model, data sets, optimiser and the composed step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import optax

from jaxrl_llm import data
from jaxrl_llm.config import Config, TrainingConfig
from jaxrl_llm.data import Batches, CharacterTokenizer, DataSet, DataSpec, Task
from jaxrl_llm.experience import Prompts
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer import transformer
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.training.learn import Update
from jaxrl_llm.training.recipes import credit_terms, loss_terms, reward_terms
from jaxrl_llm.training.step import Rollout, TrainStep, make_train_step


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
    optimizer = adamw(config.training)
    training = config.training
    update = Update(
        epochs_per_batch=training.epochs_per_batch,
        minibatches_per_epoch=training.minibatches_per_epoch,
        sequences_per_microbatch=training.sequences_per_microbatch,
        refresh_reference_every=training.refresh_reference_every,
    )
    rollout = Rollout(
        samples_per_prompt=config.rollout.samples_per_prompt,
        max_completion_tokens=config.rollout.max_completion_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        temperature=config.rollout.temperature,
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
    )
    return Parts(config, task, tokenizer, model, step)


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


def prompt_batches(parts: Parts, source: DataSet) -> Batches:
    """Batches of training prompts; the position is the step number."""
    config = parts.config
    return data.prompt_batches(
        source,
        parts.tokenizer,
        prompts_per_step=config.training.prompts_per_step,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_answer_tokens=config.rollout.max_completion_tokens,
        seed=config.seed,
        overlong=config.data.overlong_prompts,
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


def demonstration_batches(parts: Parts, source: DataSet) -> Batches:
    """Batches of reference completions for the warm start."""
    config = parts.config
    return data.supervised_batches(
        source,
        parts.tokenizer,
        sequences_per_step=config.warm_start.sequences_per_step,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        seed=config.seed,
        scratchpad=parts.task.scratchpad,
        overlong=config.data.overlong_prompts,
    )
