"""From a config to the parts of a run: model, tokenizer, data sets, optimiser and the composed step."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxrl_llm import data, selection
from jaxrl_llm.config import Config, NetworkConfig
from jaxrl_llm.data import CharacterTokenizer, Tokenizer
from jaxrl_llm.data.buckets import buckets
from jaxrl_llm.data.scripts import token_scripts
from jaxrl_llm.experience import Method
from jaxrl_llm.rollout.host_calls import Caller
from jaxrl_llm.rollout.host_environments import HostEnvironment, opened
from jaxrl_llm.run import sources
from jaxrl_llm.run.configured import (
    AnyEnvironment,
    configured_environment,
    configured_networks,
    configured_plan,
    configured_views,
    external_engine,
    given_networks,
    head_optimizer,
    require_tokens_of_policy,
)
from jaxrl_llm.run.machine import Target
from jaxrl_llm.run.optimizers import optimizer, skipping_non_finite
from jaxrl_llm.run.policy_parts import PolicyParts, longest_sequence, policy_parts, require_context
from jaxrl_llm.run.problems import columns, data_sets, naming_unreadable_data
from jaxrl_llm.run.recipes import credit_terms, entry_of, loss_terms, method, reward_terms, verdict_of
from jaxrl_llm.run.sources import Feed
from jaxrl_llm.terms import Reward, View
from jaxrl_llm.training import Resources, Rollout, TrainStep, Update, make_train_step

_MOST_PARAMETERS = 10**14
# Default numbers of bins for packed rows, as shares of the number of rows.
_PACKING = (0.25, 0.375, 0.5, 0.75)


@dataclass(frozen=True)
class Parts(PolicyParts):
    """The objects that a config describes, before data is made or programs are compiled.

    Attributes:
      step: the composed training step.
      feeds: its sources, with the functions that provide their rows on the host.
      paths: directories of networks that are read from one.
      call: calls the functions of a Python environment; only inside `opened_parts`.
    """

    step: TrainStep
    feeds: tuple[Feed, ...] = ()
    paths: Mapping[str, Path] = field(default_factory=dict)
    call: Caller | None = None

    @property
    def environment(self) -> AnyEnvironment | None:
        """The environment of multi-turn conversations; None for single-turn sampling."""
        rollout = self.step.composition.rollout
        return None if rollout is None else rollout.environment

    @property
    def scratchpad(self) -> bool:
        """Whether reference completions of generated problems show their work."""
        return self.task is None or self.task.scratchpad

    def given(self) -> dict[str, PyTree]:
        """Parameters of networks that are read from a path."""
        return given_networks(self.step.composition.networks, self.paths, self.config.networks)

    def fingerprint(self) -> dict[str, str]:
        """Hashes of the tokenizer and of the model files, which must not change before a run is resumed."""
        if self.directory is None or not isinstance(self.tokenizer, data.HuggingFaceTokenizer):
            return {}
        # The hash uses file sizes: reading the weights would take too long.
        files = [(file.name, file.stat().st_size) for file in sorted(self.directory.glob("*.safetensors"))]
        described = (self.directory / "config.json").read_text() + repr(files)
        return {"tokenizer": self.tokenizer.fingerprint, "model": hashlib.sha256(described.encode()).hexdigest()}


def parts(config: Config, target: Target | None = None, like: Parts | None = None, *, later: bool = False) -> Parts:
    """Build and check the parts of a run that do not need data.

    Args:
      config: of a run, or of one of its stages.
      target: the machine to plan for; a model directory then needs only its config.json.
      like: the parts of another stage, whose tokenizer, model and mesh are reused.
      later: whether another stage comes before this one, which may have trained adapters.

    Raises:
      ValueError: for an unknown task or method, a name that nothing provides, or sizes that do not divide.
    """
    policy = policy_parts(config, target, like)
    require_context(config, policy.directory)
    task, tokenizer, model, directory = policy.task, policy.tokenizer, policy.model, policy.directory
    training, rollout = config.training, config.rollout
    sizes = run_sizes(config, tokenizer)
    feeds = configured_sources(config, sizes)
    _require_problems(config, feeds)
    samples = any(feed.source is None for feed in feeds)
    sampled = Rollout(
        samples_per_prompt=rollout.samples_per_prompt,
        max_completion_tokens=rollout.max_completion_tokens,
        eos_ids=tuple(tokenizer.eos_ids),
        pad_id=tokenizer.pad_id,
        temperature=rollout.temperature,
        plan=configured_plan(rollout.plan, rollout.samples_per_prompt, sizes),
        prompts_per_step=training.prompts_per_step,
        replay_router=rollout.replay_router,
        slots=rollout.slots,
        truncation=rollout.truncation,
        off_policy_steps=rollout.off_policy_steps,
        environment=configured_environment(config.environment or {}, task, tokenizer),
        engine=external_engine(rollout.engine, model, directory),
        selection=_selection(config, sizes),
    )
    written = [feed.source for feed in feeds if feed.source is not None]
    if rollout.prompt_buckets and written:
        raise ValueError(
            "rollout.prompt_buckets makes prompts of several widths, but rows of another source have prompts of one "
            "width (one_width); remove rollout.prompt_buckets or the other source"
        )
    rewards = reward_terms(config.rewards, sizes)
    sizes["reward_names"] = tuple(term.name for term in rewards)
    credit = credit_terms(config.credit, sizes)
    losses, views = loss_terms(config.losses, sizes), configured_views(config.views, sizes)
    views |= verdict_views(rewards)
    if not isinstance(tokenizer, CharacterTokenizer):
        _require_own_ids([(term.name, term.function) for term in (*rewards, *credit, *losses, *views.values())])
    b1, b2 = training.adam_b1, training.adam_b2
    # Adapters that were trained before this stage are part of the initial policy, so the reference keeps a copy.
    snapshot = config.lora is not None and (later or config.warm_start_steps > 0 or config.init_from is not None)
    networks, paths = configured_networks(
        config.networks, b1, b2, snapshot=snapshot, context_tokens=longest_sequence(config)
    )
    require_tokens_of_policy(paths, tokenizer)
    with naming_unreadable_data(config):
        step = make_train_step(
            model,
            skipping_non_finite(optimizer(config.training, seed=config.seed)),
            source=[*([sampled] if samples else []), *written],
            rewards=rewards,
            credit=credit,
            losses=losses,
            update=_update(config),
            resources=Resources(
                decode=tokenizer.decode,
                encode=tokenizer.encode,
                networks=networks,
                critic=skipping_non_finite(head_optimizer(NetworkConfig(), b1, b2)),
                views=views,
                columns=columns(config),
                sources=tuple(config.data.sources or config.data.templates),
                diagnostics=config.reporting.diagnostics,
                scripts=token_scripts(tokenizer.token_bytes())
                if like is None
                else like.step.composition.resources.scripts,
                placement=policy.placement,
            ),
        )
    return Parts(**vars(policy), step=step, feeds=feeds, paths=paths)


def _update(config: Config) -> Update:
    training = config.training
    shares, widths = training.packing, training.completion_buckets
    if (limit := config.rollout.max_completion_tokens) < max((widths if isinstance(widths, tuple) else ()), default=0):
        raise ValueError(
            f"training.completion_buckets has {max(widths)}, but completions have at most "  # type: ignore[arg-type]
            f"rollout.max_completion_tokens {limit}; remove that bucket, or raise the limit"
        )
    return Update(
        packing=_PACKING if shares is True else shares or (),
        completion_buckets=buckets(limit)[:-1] if widths is True else widths or (),
        epochs_per_batch=training.epochs_per_batch,
        minibatches_per_epoch=training.minibatches_per_epoch,
        sequences_per_microbatch=training.sequences_per_microbatch,
        freeze_policy_steps=training.freeze_policy_steps,
        alignment_every_steps=training.alignment_every_steps,
        alignment_learning_rate=training.learning_rate,
    )


def verdict_views(rewards: Sequence[Reward]) -> dict[str, View]:
    """Views in which networks of the run generate verdicts for rewards, by name."""
    asked = {verdict_of(t.name): getattr(t.function, "written_view", None) for t in rewards}
    return {name: View(**described, name=name) for name, described in asked.items() if described}


def run_sizes(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Sizes of the run by the names of the hyper-parameters that get them."""
    training, rollout = config.training, config.rollout
    sizes = {
        "samples_per_prompt": rollout.samples_per_prompt,
        "max_prompt_tokens": rollout.max_prompt_tokens,
        "max_completion_tokens": rollout.max_completion_tokens,
        "temperature": rollout.temperature,
        "prompts_per_step": training.prompts_per_step,
        "sequences_per_step": rollout.samples_per_prompt * training.prompts_per_step,
        "total_steps": training.steps,
        "seed": config.seed,
        "pad_id": tokenizer.pad_id,
        "encode": tokenizer.encode,
        "tokenizer": tokenizer,
        "overlong_prompts": config.data.overlong_prompts,
    }
    if config.task is not None:
        sizes["prompt_ids"] = config.task.train_items
    return sizes


def configured_sources(config: Config, sizes: Mapping[str, Any]) -> tuple[Feed, ...]:
    """The sources in section `source`.

    Raises:
      ValueError: for an unknown source, or two sources of written rows.
    """
    entries = [entry_of(entry, "source") for entry in config.source]
    known = dict(sizes) | {"beside": any(name == "sampler" for name, _ in entries)}
    del known["sequences_per_step"]  # a source has its own hyper-parameter of this name
    feeds = []
    for name, hyper in entries:
        feed = method(name, hyper, (sources,), "source", known)
        feeds.append(feed if isinstance(feed, Feed) else feed())
    handed = [name for (name, _), feed in zip(entries, feeds, strict=True) if feed.rows or feed.stored]
    if len(handed) > 1:
        raise ValueError(
            f"source has {handed[0]} and {handed[1]}; a step takes written rows of one source, so remove one of them"
        )
    return tuple(feeds)


def _require_problems(config: Config, feeds: Sequence[Feed]) -> None:
    """Raises ValueError if a source needs problems and the config has none."""
    if not config.has_problems and any(feed.file is None for feed in feeds):
        raise ValueError(
            "task, data.path and data.sources are missing; set task to a built-in task, data.path to a file of yours, "
            "or source to one that reads a file"
        )


def _selection(config: Config, sizes: Mapping[str, Any]) -> Any:
    """The method that chooses the prompts of a step; None uses the order of the data."""
    if config.data.selection is None:
        return None
    items = data_sets(config, ["train"])["train"]
    of_data = {"items": len(items), "records": [items[index] for index in range(len(items))]}
    name, hyper = entry_of(config.data.selection, "data.selection")
    made = method(name, hyper, (selection,), "data.selection", {**sizes, **of_data})
    return made() if callable(made) else made


@contextmanager
def opened_parts(built: Parts, *, log: Path | None = None, stop: Callable[[], None] = lambda: None) -> Iterator[Parts]:
    """A context with the parts and their Python environment running; without one, the parts unchanged.

    Args:
      built: the parts.
      log, stop: as for `rollout.host_calls.caller`.
    """
    if not isinstance(built.environment, HostEnvironment):
        yield built
        return
    with opened(built.environment, log=log, stop=stop) as call:
        yield replace(built, call=call)


def _require_own_ids(functions: Sequence[tuple[str, Any]]) -> None:
    """Raises ValueError for functions whose default token ids are those of the built-in tokenizer."""
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
                    f"{name} uses token ids of the built-in tokenizer ({parameter.name} is {parameter.default}), "
                    "but the model at model.path has its own tokenizer; set the ids, or use a function that reads "
                    "text, such as number_match"
                )
