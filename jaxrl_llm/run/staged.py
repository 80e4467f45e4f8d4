"""From the config of a run to its stages: the warm start, then section `stages`, every one a config of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxrl_llm.config import Config, ConfigError, parse_config, stage_trees
from jaxrl_llm.run.setup import parts

WARM_START = "warm start"  # name of the stage


def last_stage(config: Config) -> Config:
    """The config of the last stage of a run: the config itself if it has one stage."""
    return _stage_configs(config)[-1]


def _stage_configs(config: Config) -> list[Config]:
    vocabulary = getattr(config.model, "vocabulary_size", None)
    known = {} if vocabulary is None else {"vocabulary_size": vocabulary}
    made = []
    for name, tree in zip(_stage_names(config), stage_trees(config), strict=True):
        try:
            made.append(parse_config(tree, **known))
        except ConfigError as error:
            raise ConfigError(f"stage {name!r}: {error}") from None
    return made or [config]


def _stage_names(config: Config) -> list[str]:
    return [str(stage.get("name") or f"stage {number}") for number, stage in enumerate(config.stages, 1)]


def staged(config: Config) -> list[dict[str, Any]]:
    """The stages of a run, as arguments of `stages.Stage`, all checked: the warm start, then section `stages`, or the
    config itself as the only stage.

    Raises:
      ValueError: as `parts` does, or for a network that a stage reads but no stage trains.
    """
    warm, found, named = config.warm_start, [], _stage_names(config)
    taken = [*([WARM_START] if config.warm_start_steps else []), *named]
    if len(set(taken)) < len(taken):
        raise ValueError(f"stages are named {', '.join(taken)}; give each a name of its own")
    configs = _stage_configs(config)
    main = parts(configs[0])
    named = named or ["reinforcement" if main.step.composition.rollout is not None else "training"]
    if config.warm_start_steps:
        probe = {"probes": ("pass@1",), "stop_at_accuracy": warm.stop_at_accuracy, "first_saved": False}
        built = parts(warm_start(configs[0]), like=main)
        found.append(
            {"name": WARM_START, "parts": built, "steps": warm.steps, "probe_every_steps": warm.probe_every_steps}
            | probe
        )
    for name, one in zip(named, configs, strict=True):
        built = main if one is configs[0] else parts(one, like=main, later=True)
        every = one.evaluation.every_steps
        found.append({"name": name, "parts": built, "steps": one.training.steps, "probe_every_steps": every})
    _check_trained(found)
    return found


def earlier_stages(config: Config) -> list[tuple[str, Config]]:
    """(name, config) of the stages before the last one."""
    configs = _stage_configs(config)
    warm = [(WARM_START, warm_start(configs[0]))] if config.warm_start_steps else []
    return warm + list(zip(_stage_names(config), configs[:-1], strict=False))


def warm_start(config: Config) -> Config:
    """Supervised steps on reference completions, as a stage."""
    warm, training = config.warm_start, config.training
    rollout = replace(
        config.rollout,
        plan=(),
        off_policy_steps=0,
        prompt_buckets=False,
        engine=None,
        slots=None,
        replay_router=False,
        top_k=None,
        top_p=1.0,
        min_p=0.0,
        renormalised=False,
    )
    plain = replace(
        training,
        steps=warm.steps,
        epochs_per_batch=1,
        minibatches_per_epoch=1,
        sequences_per_microbatch=None,
        learning_rate=warm.learning_rate,
        warmup_steps=warm.warmup_steps,
        schedule="constant",
        optimizer="adamw",
        weight_decay=0.0,
        adam_b1=0.9,
        adam_b2=0.999,
        moment_dtype=None,
        bfloat16_update="nearest",
        max_gradient_norm=1.0,
        offload=(),
        freeze_policy_steps=0,
        stop_when=None,
        alignment_every_steps=0,
    )
    return replace(
        config,
        warm_start=replace(warm, steps=0),
        source=({"demonstrations": {"sequences_per_step": warm.sequences_per_step}},),
        rewards=(),
        credit=(),
        losses=("negative_log_likelihood",),
        networks={},
        views={},
        stages=(),
        rollout=rollout,
        training=plain,
        data=replace(config.data, selection=None),
    )


def _check_trained(stages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if a stage reads a network with a head that no earlier stage trains."""
    trained: set[str] = set()
    for stage in stages:
        built = stage["parts"]
        c = built.step.composition
        trained |= c.learning
        for name, network in c.networks.items():
            described = name in built.config.networks
            if described and network.head is not None and name not in trained and name not in built.paths:
                raise ValueError(
                    f"stage {stage['name']!r} reads network {name!r}, which no stage before it trains; add a stage "
                    f"whose losses train it, or give networks.{name}.path"
                )
