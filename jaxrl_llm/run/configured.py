"""Builds the parts of a step from sections of a config."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import jax
import optax
import pydantic
from jaxtyping import PyTree

from jaxrl_llm import advantages, losses, rewards, schedules
from jaxrl_llm.bounds import counted, shown
from jaxrl_llm.config import OF_ENVIRONMENTS, EngineConfig, NetworkConfig
from jaxrl_llm.data import CharacterTokenizer, Task, Tokenizer, load_tokenizer
from jaxrl_llm.endpoints import Endpoint
from jaxrl_llm.fields import nearest
from jaxrl_llm.hub import model_directory
from jaxrl_llm.models import sequence_classifiers, weights
from jaxrl_llm.models.adapters import in_int8, stored_in_int8
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.heads import HeadConfig
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.own_layout import in_own_layout
from jaxrl_llm.rollout import plans
from jaxrl_llm.rollout.environments import Environment
from jaxrl_llm.rollout.hand_over import External, disk_hand_over
from jaxrl_llm.rollout.host_calls import can_be_sent
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.rollout.plans import Plan
from jaxrl_llm.rollout.tasks import task_environment
from jaxrl_llm.run.directories import is_step
from jaxrl_llm.run.optimizers import clipping, named_optimizer, skipping_non_finite
from jaxrl_llm.run.recipes import RecipeError, checked, entry_of, method, number_or_method, user_function
from jaxrl_llm.terms import View
from jaxrl_llm.training.networks import GIVEN, Network

AnyEnvironment = Environment | HostEnvironment
_PLAN_FUNCTIONS: tuple[ModuleType, ...] = (plans, advantages, rewards, losses, schedules)


# Hyper-parameters of plans that are themselves functions of rows.
_OF_PLANS = ("choose", "failed", "lost")


def configured_plan(entries: Sequence[Any], samples_per_prompt: int, sizes: Mapping[str, Any]) -> Plan | None:
    """The plan of section rollout.plan, built from the innermost outwards; None without plan.

    Args:
      entries: names of `jaxrl_llm.rollout.plans`, or users' functions, with hyper-parameters.
      samples_per_prompt: final number of rows per group.
      sizes: sizes of the run by name, to fill in keywords.

    Raises:
      RecipeError: for an unknown plan or hyper-parameter.
    """
    if not entries:
        return None
    parsed = [entry_of(entry, "rollout.plan") for entry in entries]
    inside = samples_per_prompt - sum(int(hyper.get("branches", 0)) for _, hyper in parsed)
    made = plans.plain(samples_per_prompt=max(inside, 1))
    for name, hyper in parsed:
        where = f"rollout.plan.{name}"
        if "temperature" in hyper and isinstance(hyper["temperature"], Mapping | str):
            hyper = hyper | {"temperature": number_or_method(hyper["temperature"], f"{where}.temperature")}
        for asked in [key for key in _OF_PLANS if key in hyper]:
            chosen, given = entry_of(hyper[asked], f"{where}.{asked}")
            hyper = hyper | {asked: method(chosen, given, _PLAN_FUNCTIONS, f"{where}.{asked}", sizes)}
        function = method(name, hyper, (plans,), "rollout.plan", sizes)
        try:
            made = function(made)
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error
    return made


def configured_views(entries: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, View]:
    """The functions of section views, by the name of the view.

    Beside hyper-parameters, an entry of a function that reads text may have `max_prompt_tokens`,
    `max_completion_tokens` and `deadline_s`; an entry of a written view may have `written_by`, `temperature`,
    `mixed_with`, `share`, `guided_by`, `strength` and `candidates` (`View`).
    """
    made = {}
    for view, entry in entries.items():
        name, hyper = entry_of(entry, f"views.{view}")
        known = (*_OF_VIEWS, *_OF_WRITTEN) if "written_by" in hyper else _OF_VIEWS
        calling = {key: hyper.pop(key) for key in known if key in hyper}
        function = method(name, hyper, (rewards, advantages, losses), f"views.{view}", sizes, known)
        try:
            made[view] = View(function, name=view, **calling)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"views.{view}: {error}") from error
        of_text = [key for key in calling if key in (_OF_VIEWS if not made[view].written_by else _OF_VIEWS[1:])]
        if of_text and not made[view].on_host:
            raise RecipeError(
                f"views.{view}.{of_text[0]} is only for views that read text, and {name} does not; leave it out"
            )
    return made


_OF_VIEWS = ("max_completion_tokens", "max_prompt_tokens", "deadline_s")
_OF_WRITTEN = ("written_by", "temperature", "mixed_with", "share", "guided_by", "strength", "candidates")


def configured_networks(
    sections: Mapping[str, NetworkConfig], b1: float, b2: float, *, snapshot: bool, context_tokens: int
) -> tuple[dict[str, Network], dict[str, Path]]:
    """(networks by name, directories of networks read from a path).

    Args:
      sections: of the config.
      b1, b2: of AdamW.
      snapshot: for a policy with adapters: the reference is the initial policy instead of the base.
      context_tokens: length of the longest sequence of the run.
    """
    made, paths = {}, {}
    for name, section in sections.items():
        model, head = None, _head(name, section)
        if section.path is not None and is_run(section.path):
            from jaxrl_llm.run.restored import restored_network  # which builds the parts of that run

            model, network, _ = restored_network(section.path, section.of or name)
            head, paths[name] = network.head, Path(section.path)
        elif section.path is not None:
            directory = model_directory(section.path)
            execution = {"parameter_dtype": section.parameter_dtype, "compute_dtype": section.compute_dtype}
            scores = sequence_classifiers.holds_reward_model(directory)
            described = weights.load_config(directory, scores=scores, context_tokens=context_tokens, **execution)
            model, paths[name] = transformer(described), directory
            if scores and head not in (None, HeadConfig()):
                raise ValueError(
                    f"networks.{name}.path is {section.path!r}, a reward model with a head of its own; leave "
                    f"networks.{name}.head out"
                )
            if head is not None and not scores:
                raise ValueError(
                    f"networks.{name}.path is {section.path!r}, a checkpoint of that kind holds no head; leave "
                    f"networks.{name}.head out, name a reward model (ForSequenceClassification), or train the head in "
                    "a stage or a run and name that"
                )
            head = HeadConfig() if scores else None
        if section.int8:
            assert model is not None  # it has a path
            model = in_int8(model)
        if section.rules:
            assert model is not None  # it has a path
            model = in_own_layout(model, section.rules)
        learns = section.learns if section.learns is not None else head is not None and section.path is None
        if section.learns is None and not learns:
            _require_no_rate(name, section)
        made[name] = Network(
            origin=GIVEN if section.path is not None else section.origin,
            model=model,
            head=head,
            says="first" if name == "twin" and section.says == "token" else section.says,
            backbone=section.backbone,
            optimizer=skipping_non_finite(head_optimizer(section, b1, b2)) if learns else None,
            decay=section.decay,
            copy_every=section.copy_every,
            copy_at=section.copy_at,
            snapshot=snapshot,
            temperature=section.temperature,
            always_origin=section.always_origin or (section.temperature is not None and not section.decay),
        )
    if snapshot and "reference" not in made:
        made["reference"] = Network(snapshot=True)
    return made, paths


def _require_no_rate(name: str, section: NetworkConfig) -> None:
    """Raise ValueError for a learning setting of a network that does not learn."""
    usual = {field.name: field.default for field in dataclasses.fields(NetworkConfig)}
    for key in ("learning_rate", "optimizer"):
        if (value := getattr(section, key)) != usual[key]:
            why = "is read from a path" if section.path is not None else "has no head"
            raise ValueError(
                f"networks.{name}.{key} is {shown(value)}, but a network that {why} does not learn by default; "
                f"set networks.{name}.learns to true, or leave {key} out"
            )


def require_tokens_of_policy(paths: Mapping[str, Path], tokenizer: Tokenizer) -> None:
    """Raise ValueError for networks whose tokenizer differs from the policy's.

    Args:
      paths: run or Hugging Face directories of networks, by name.
      tokenizer: of the policy.

    Raises:
      ValueError: for a network whose tokenizer has different ids, with an example.
    """
    for name, directory in paths.items():
        theirs: Any = None
        if is_run(str(directory)):
            from jaxrl_llm.run.restored import run_tokenizer  # which reads the config of that run

            theirs = run_tokenizer(directory)
        elif (directory / "tokenizer.json").is_file():
            theirs = load_tokenizer(directory)
        if theirs is None:
            continue
        ours, others = _ids(tokenizer), _ids(theirs)
        kin = hasattr(tokenizer, "backend") == hasattr(theirs, "backend")
        differing = [text for text, number in ours.items() if others.get(text) != number] if kin else []
        if differing or not kin:
            such = f" (other ids of {counted(len(differing), 'token')}, such as {differing[0]!r})" if differing else ""
            raise ValueError(
                f"networks.{name}.path is {str(directory)!r}, whose tokenizer differs from the policy's{such}, but "
                "networks receive token ids; use a model with the policy's tokenizer, or score text with your own "
                "function (rewards: [{python: module:function}])"
            )


def _ids(tokenizer: Any) -> dict[str, int]:
    """The id of every token."""
    if hasattr(tokenizer, "backend"):
        return tokenizer.backend.get_vocab()
    return {text: number for number, text in enumerate(tokenizer.tokens)}


def is_run(path: str) -> bool:
    """Whether a path is a run directory, or one of its checkpoints."""
    here = Path(path)
    return (here / "checkpoints").is_dir() or is_step(here)


def _head(name: str, section: NetworkConfig) -> HeadConfig | None:
    from jaxrl_llm.network_names import HEADS

    if section.head is None:
        return HeadConfig(outputs=HEADS[name]) if name in HEADS else None
    if section.head == "scalar":
        return HeadConfig(outputs=1)
    known = [field.name for field in dataclasses.fields(HeadConfig)]
    if isinstance(section.head, Mapping) and (unknown := sorted(set(map(str, section.head)) - set(known))):
        raise ValueError(f"networks.{name}.head is {shown(section.head)}; {nearest(unknown[0], known)}")
    try:
        return pydantic.TypeAdapter(HeadConfig).validate_python(section.head)
    except pydantic.ValidationError as error:
        said, where = error.errors()[0]["msg"].removeprefix("Value error, "), error.errors()[0]["loc"]
        told = ".".join(map(str, ("head", *where)))
        raise ValueError(f"networks.{name}.{told} of {shown(section.head)}: {said}") from None


def head_optimizer(section: NetworkConfig, b1: float, b2: float) -> optax.GradientTransformation:
    """The optimiser of a network beside the policy, with global norm clipping and a constant rate."""
    if section.optimizer == "adamw":
        made = optax.adamw(section.learning_rate, b1=b1, b2=b2, weight_decay=0.0)
    else:
        made = named_optimizer(section.optimizer, section.learning_rate, 0.0, "networks.*.optimizer")
    return optax.chain(clipping(section.max_gradient_norm), made)


def given_networks(
    networks: Mapping[str, Network], paths: Mapping[str, Path], sections: Mapping[str, NetworkConfig]
) -> dict[str, PyTree]:
    """Parameters of the networks read from a path."""
    found = {}
    for name, directory in paths.items():
        if name not in networks:  # nothing names it
            continue
        network = networks[name]
        assert network.model is not None
        if is_run(str(directory)):
            from jaxrl_llm.run.restored import restored_network

            params = restored_network(directory, sections[name].of or name)[2]
        elif network.head is not None:
            params = sequence_classifiers.load_reward_params(directory, network.model.config)
        else:
            params = weights.load_params(directory, network.model.config)
        params = jax.tree.map(jax.numpy.asarray, params)
        if sections[name].int8:
            backbone = stored_in_int8(params if network.head is None else params["backbone"])
            params = backbone if network.head is None else {**params, "backbone": backbone}
        found[name] = params
    return found


def configured_environment(
    options: Mapping[str, Any], task: Task | None, tokenizer: Tokenizer
) -> AnyEnvironment | None:
    """The environment of a config; None for single completions.

    Args:
      options: section environment: options of the task's environment, or `python: "module:function"` with the keyword
        arguments of that function, which is called with the tokenizer and returns an environment. Keys of
        `OF_ENVIRONMENTS` that the function does not take say how an environment in Python is called: `executor`
        (the default is processes if it can be pickled), `deadline_seconds`, `on_failure`, ...
      task: the task of the run, or None.
      tokenizer: of the policy.

    Raises:
      ValueError: for an invalid environment, or options without an environment.
    """
    if "python" in options:
        path = str(options["python"])
        if ":" not in path:
            raise ValueError(f"environment.python is {path!r}; write it as module:function")
        function, given = user_function(path, "environment"), {k: v for k, v in options.items() if k != "python"}
        taken = inspect.signature(function).parameters
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        free = {"executor"} if every else OF_ENVIRONMENTS
        calling = {key: given.pop(key) for key in sorted(free - taken.keys()) if key in given}
        try:
            made = function(tokenizer, **given)
        except TypeError as error:
            raise ValueError(
                f"environment.python: {path!r} could not be called with the tokenizer and "
                f"{', '.join(given) or 'no other arguments'}: {error}; it must accept them, and return an environment"
            ) from error
        if not isinstance(made, AnyEnvironment):
            raise ValueError(
                f"environment.python: {path!r} returned a {type(made).__name__}; it must return an Environment or a "
                "HostEnvironment of jaxrl_llm.rollout"
            )
        return _called(made, calling)
    if task is None or task.environment is None:
        if options:
            raise ValueError(
                f"environment.{next(iter(options))} is set, but there is no environment; choose the task grid, "
                "calculator, bargaining or self_correction, or name your own environment in environment.python"
            )
        return None
    if not isinstance(tokenizer, CharacterTokenizer):
        raise ValueError(
            f"the environment of task {task.name!r} reads and writes ids of the built-in tokenizer, but the model at "
            "model.path has a tokenizer of its own; describe a model by its shape, or name an environment that reads "
            "text in environment.python"
        )
    return task_environment(task, **options)


def _called(environment: AnyEnvironment, calling: Mapping[str, Any]) -> AnyEnvironment:
    """The environment, called as configured; without `executor` in processes if its functions can be pickled."""
    if not isinstance(environment, HostEnvironment):
        for key, value in calling.items():
            raise ValueError(
                f"environment.{key} is {value!r}, but this environment is not a HostEnvironment; leave it out"
            )
        return environment
    kinds = get_type_hints(HostEnvironment)
    environment = environment._replace(
        **{key: checked(kinds[key], value, f"environment.{key}") for key, value in calling.items() if key != "executor"}
    )
    chosen = calling.get("executor") or environment.executor
    if chosen is None and can_be_sent({"reset": environment.reset, "step": environment.step}):
        chosen = "process"
    return environment._replace(executor=chosen)


def external_engine(config: EngineConfig | None, model: Model, source: Path | None) -> External | None:
    """The external engine of a config; None without one."""
    if config is None:
        return None
    engine = Endpoint(
        config.url,
        config.model,
        timeout_s=config.timeout_s,
        concurrency=config.concurrency,
        retries=config.retries,
        api_key_variable=config.api_key_variable,
        request=config.request,
    )
    hand_over = None
    if config.weights_directory is not None and config.reload_path is not None:
        hand_over = disk_hand_over(
            engine,
            model,
            config.weights_directory,
            path=config.reload_path,
            body=config.reload_body,
            then=config.reload_then,
            source=source,
        )
    return External(
        engine,
        hand_over,
        max(config.reload_every_steps, 1),
        config.probe_prompts,
        config.probe_bound,
        config.probe_largest_bound,
    )
