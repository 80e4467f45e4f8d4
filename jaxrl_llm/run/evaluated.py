"""The model of `jaxrl eval`, and the problems, grader and rewards of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxrl_llm import data
from jaxrl_llm.bounds import counted
from jaxrl_llm.config import ConfigError
from jaxrl_llm.data.tasks.items import own_columns, record
from jaxrl_llm.evaluation import Grader, make_records, make_score, task_grader
from jaxrl_llm.evaluation.benchmark_formats import GRADERS, read_problems
from jaxrl_llm.evaluation.evaluate import column
from jaxrl_llm.evaluation.suites import Evaluation
from jaxrl_llm.experience import FACTS, Method
from jaxrl_llm.fields import TEXT
from jaxrl_llm.models.mixture import value_guided
from jaxrl_llm.rollout.host_calls import Caller
from jaxrl_llm.rollout.host_environments import HostEnvironment, opened
from jaxrl_llm.run import checkpoints
from jaxrl_llm.run.batches import grader as run_grader
from jaxrl_llm.run.batches import named_grader
from jaxrl_llm.run.configured import AnyEnvironment, configured_environment
from jaxrl_llm.run.directories import at_hand, is_run
from jaxrl_llm.run.evaluation_batch import fitting_batch
from jaxrl_llm.run.policy_parts import PolicyParts
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.recipes import ModuleMissing, entry_of, reward_terms
from jaxrl_llm.run.restored import Policy, checkpoint_params, restored_network, restored_policy, restored_run
from jaxrl_llm.run.setup import run_sizes
from jaxrl_llm.run.stages import spread
from jaxrl_llm.signatures import missing
from jaxrl_llm.terms import Reward
from jaxrl_llm.training import Placement
from jaxrl_llm.training.networks import backbone_of
from jaxrl_llm.training.reading import columns_of

# Fields that rewards of an evaluation can read: results of sampling, but no outputs of other networks and no memory.
_OF_SAMPLING = frozenset(FACTS) - {"router_choices", "support"}


class Evaluated(NamedTuple):
    """The model of an evaluation.

    Attributes:
      policy: the model with the parameters of its newest (or the named) checkpoint.
      built: the policy of its run; None for a model directory.
      checkpoints: (label, function that reads the parameters) of all evaluated checkpoints.
      guidance: settings of value guidance (`guided`), as plain data.
      environment: of the run's conversations, if its own problems are evaluated (`with_environment`).
      call: calls the functions of an environment in Python.
    """

    policy: Policy
    built: PolicyParts | None
    checkpoints: list[tuple[str, Callable[[], PyTree]]]
    guidance: Mapping[str, Any] = {}
    environment: AnyEnvironment | None = None
    call: Caller | None = None


class Prepared(NamedTuple):
    """One evaluation, ready to sample.

    Attributes:
      items: the problems.
      records: see `make_records`.
      settings: plain data that determines the samples.
      notes: what is not measured, and why.
    """

    items: list[dict[str, Any]]
    records: Callable[..., Iterator[list[dict[str, Any]]]]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


def evaluated(path: str, *, every: bool = False, chat: bool = False) -> Evaluated:
    """The model at a path: a run, a checkpoint, a model directory or a repository.

    Args:
      path: a local path, or the id of a repository.
      every: whether all checkpoints of a run are evaluated, in ascending order.
      chat: whether the chat template of a model directory is applied.

    Raises:
      ValueError: if there is no model, `every` is set for something else than a run, or `chat` for a run.
    """
    path = str(at_hand(path))
    if is_run(Path(path)):
        if chat:
            raise ConfigError(f"{path} is a run, whose config defines the form of prompts; leave --chat out")
        built, policy = restored_run(path)
        folder = policy.source.parent
        steps = checkpoints.steps(folder) if every else []
        named = [(f"{step}", lambda step=step: checkpoint_params(built, folder, step)) for step in steps]
        return Evaluated(policy, built, named or [(policy.source.name, lambda: policy.params)])
    if every:
        raise ConfigError(f"--all evaluates the checkpoints of a run, but {path} is not a run; leave --all out")
    policy = restored_policy(path, chat=chat)
    return Evaluated(policy, None, [("model", lambda: policy.params)])


@contextmanager
def with_environment(of: Evaluated, evaluations: Iterable[Evaluation]) -> Iterator[Evaluated]:
    """A context with the environment of the run, if one of the evaluations is on the run's own problems."""
    built, environment = of.built, None
    sources = [] if built is None else [entry_of(entry, "source")[0] for entry in built.config.source]
    if built is not None and "sampler" in sources and any(_own_problems(one) for one in evaluations):
        environment = configured_environment(built.config.environment or {}, built.task, built.tokenizer)
    if not isinstance(environment, HostEnvironment):
        yield of._replace(environment=environment)
        return
    with opened(environment) as call:
        yield of._replace(environment=environment, call=call)


def _own_problems(one: Evaluation) -> bool:
    return one.data is None and one.task is None


def guided(of: Evaluated, path: str, network: str, *, strength: float, candidates: int) -> Evaluated:
    """The model with value-guided sampling by a value network of its run.

    Args:
      of: one checkpoint of a run.
      path: the path of the run or checkpoint.
      network: name of a network of the run whose head has one output.
      strength, candidates: as for `models.mixture.value_guided`.

    Raises:
      ValueError: for a model directory, several checkpoints, a policy with adapters, or a network without such a head.
    """
    if of.built is None or len(of.checkpoints) > 1 or of.policy.model.trained is not None:
        raise ConfigError(
            f"--guided-by needs one checkpoint of a run without adapters, which {path} is not; name one "
            "checkpoint, or leave --guided-by out"
        )
    judge, found, params = restored_network(at_hand(path), network)
    if found.head is None or found.head.outputs != 1:
        raise ConfigError(
            f"--guided-by is {network!r}, which has no head with one output; name a value or reward network"
        )
    model = value_guided(of.policy.model, judge, strength=strength, candidates=candidates)
    (label, read), *_ = of.checkpoints

    def both() -> PyTree:
        own = read()
        return own, {"head": params["head"], "backbone": backbone_of(judge, params, own)}

    guidance = {"guided_by": network, "strength": strength, "candidates": candidates}
    policy = replace(of.policy, model=model)
    return of._replace(policy=policy, checkpoints=[(label, both)], guidance=guidance)


def prepared(one: Evaluation, of: Evaluated, *, reference: str | None = None, batch: int | None = None) -> Prepared:
    """The problems, grader and sampling of one evaluation.

    Args:
      one: description of the evaluation.
      of: the model.
      reference: path of a reference policy for the KL divergence.
      batch: number of completions decoded together; None: the number in the run's config, or else as many as fit on the
        device.

    Raises:
      ValueError: for invalid files, columns, names or sizes, before anything is sampled.
    """
    built, policy = of.built, of.policy
    config = None if built is None else built.config
    items, grade, task = _problems(one, built)
    if one.prompt_format != "{body}":
        items = [_formatted(item, one.prompt_format) for item in items]
    own = _own_problems(one)
    environment = of.environment if own else None
    if task is not None:
        environment = configured_environment({}, task, policy.tokenizer)
    if reference is not None and environment is not None:
        raise ConfigError("--reference scores single completions, but this task has an environment; leave it out")
    for name in one.by:
        for item in items:
            column(item, name)
    temperature = one.temperature or (config.evaluation.temperature if config is not None else 1.0)
    limits = _limits(one, policy)
    place = Placement() if built is None else built.placement
    rewards, notes = _rewards(one, built, items)
    size = batch or (config.evaluation.sequences_per_batch if config is not None else None)
    size = size or fitting_batch(
        policy.model,
        rows=1 + one.samples_per_problem,
        prompt=limits[0],
        completion=limits[1],
        mesh=place.mesh,
        rules=place.rules,
        gathered=place.gather_for_rollout,
    )
    records = make_records(
        policy.model,
        grade,
        policy.tokenizer,
        samples_per_problem=one.samples_per_problem,
        max_prompt_tokens=limits[0],
        max_completion_tokens=limits[1],
        sequences_per_batch=size,
        temperature=temperature,
        overlong=config.data.overlong_prompts if config is not None and own else "error",
        environment=environment,
        call=of.call if own else None,
        rewards=rewards,
        reference=None if reference is None else _scored(reference, policy, temperature),
        columns=one.by,
        answers_encoded=one.data is None,
        mesh=place.mesh,
        rules=place.rules,
        gather=place.gather_for_rollout,
    )
    ignored = {"k", "problems", "samples", "by"}
    settings = {name: value for name, value in asdict(one).items() if name not in ignored}
    settings |= {"samples": one.samples_per_problem, "temperature": temperature, "reference": reference}
    settings |= of.guidance
    settings |= {"max_prompt_tokens": limits[0], "max_completion_tokens": limits[1], "sequences_per_batch": size}
    return Prepared(items, records, settings, notes)


def _problems(one: Evaluation, built: PolicyParts | None) -> tuple[list[dict[str, Any]], Grader, Any]:
    """(problems, grader, the built-in task, or None for problems of a file or a run)."""
    task, default = None, one.grader
    if one.data is not None:
        items = read_problems(one.data, one.format, one.fields)
        default = default or GRADERS.get(one.format, "number")
    elif one.task is not None:
        task = data.tasks.task(one.task, **one.options)
        levels, count = one.levels or task.levels, one.problems or 512
        share = [count // len(levels) + (place < count % len(levels)) for place in range(len(levels))]
        drawn = [
            task.generate(level=level, count=n, seed=one.seed, split=one.split)
            for level, n in zip(levels, share, strict=True)
            if n
        ]
        items = [record(item, number) for number, item in enumerate(item for part in drawn for item in part)]
    elif built is not None:
        source = data_sets(built.config, [one.split])[one.split]
        wanted = one.problems or min(built.config.evaluation.problems, len(source))
        if wanted > len(source):
            raise ValueError(f"--problems is {wanted}, but the {one.split} split has {counted(len(source), 'problem')}")
        items = [record(source[int(i)], int(i)) for i in spread(len(source), wanted)]
        if one.grader is None:
            return items, run_grader(built, source), None
    else:
        raise ConfigError(
            "a model directory has no problems of its own; name a file with --data FILE, or a built-in task with --task"
        )
    if one.data is not None and one.problems is not None:
        if one.problems > len(items):
            raise ValueError(f"--problems is {one.problems}, but {one.data} has {counted(len(items), 'problem')}")
        items = [items[i] for i in spread(len(items), one.problems)]
    if task is not None and default is None:
        return items, task_grader(task), task
    assert default is not None
    return items, named_grader(default, items), task


def _formatted(item: Mapping[str, Any], form: str) -> dict[str, Any]:
    if "messages" in item:
        raise ConfigError("prompt_format is only for plain prompts, but the data holds messages; leave it out")
    return {**item, "body": form.replace("{body}", item["body"])}


def _limits(one: Evaluation, policy: Policy) -> tuple[int, int]:
    completion = one.max_completion_tokens or policy.max_completion_tokens
    room = None if policy.context_tokens is None else policy.context_tokens - completion
    if room is not None and room < 1:
        raise ValueError(
            f"completions of {completion} tokens leave no room for a prompt in the model's context of "
            f"{policy.context_tokens} tokens; set --max-tokens lower"
        )
    if room is not None and (one.max_prompt_tokens or 0) > room:
        raise ValueError(
            f"--max-prompt-tokens is {one.max_prompt_tokens}, but completions of {completion} tokens leave room for "
            f"{room} in the model's context of {policy.context_tokens} tokens; lower one of the two"
        )
    return one.max_prompt_tokens or policy.max_prompt_tokens or min(room or 1024, 1024), completion


def _rewards(
    one: Evaluation, built: PolicyParts | None, items: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(rewards by name, notes): the requested ones, or those of the run that read only samples and columns of the
    data and whose module is found."""
    notes = []
    arrays = _OF_SAMPLING if one.data is None else _OF_SAMPLING - {"answer_tokens", "answer_length"}
    text = TEXT.union(set.intersection(*({*columns_of([own_columns(item)])} for item in items)) if items else ())
    if one.rewards is not None:
        sizes = {"max_completion_tokens": one.max_completion_tokens, "samples_per_prompt": one.samples_per_problem}
        terms = reward_terms(one.rewards, {name: size for name, size in sizes.items() if size is not None})
        for term in terms:
            known = arrays | text if term.on_host else arrays
            if lacking := missing(term.function, known):
                raise ConfigError(
                    f"reward {term.name!r} reads {lacking[0]!r}, which an evaluation does not have; it has "
                    f"{', '.join(sorted(known))}"
                )
    else:
        own: list[Reward] = []
        sizes = {} if built is None else run_sizes(built.config, built.tokenizer)
        for entry in () if built is None else built.config.rewards:
            try:
                own += reward_terms([entry], sizes)
            except ModuleMissing as error:
                notes.append(f"not measured: {error}")
        terms = [
            term
            for term in own
            if not isinstance(term.function, Method)
            and not missing(term.function, arrays | text if term.on_host else arrays)
        ]
    return {term.name: term.function for term in terms}, tuple(notes)


def _scored(reference: str, policy: Policy, temperature: float) -> Callable[[Sequence[Any]], list[list[float]]]:
    other = restored_policy(reference)
    if other.model.vocabulary_size != policy.model.vocabulary_size:
        raise ConfigError(
            f"--reference {reference} has a vocabulary of {other.model.vocabulary_size} tokens and the policy one of "
            f"{policy.model.vocabulary_size}; a KL divergence needs the same vocabulary"
        )
    score = make_score(other.model, temperature=temperature, sequences_per_batch=32)
    return lambda texts: score(other.params, texts)
