"""Sections on the inputs of a run: problems, data, the model, and the supervised warm start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic

from jaxrl_llm.config.errors import FREE
from jaxrl_llm.models.attention import AttentionChoice
from jaxrl_llm.models.transformer_config import LayerLoop, Precision, TransformerConfig
from jaxrl_llm.ranges import Count, Natural, NonNegative, Positive, Range, Share, require_ranges


@dataclass(frozen=True)
class TaskConfig:
    """Which problems to train and test on. `jaxrl tasks` lists them.

    Attributes:
      name: a built-in task.
      levels: difficulty levels, mixed in equal shares.
      options: keyword options of the task.
      train_items, validation_items, test_items: problems in each split; splits never overlap.
      seed: random seed of the generator.
    """

    name: str
    levels: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    train_items: Annotated[int, Range(1, 10**7)] = 8192
    validation_items: Annotated[int, Range(1, 10**7)] = 256
    test_items: Annotated[int, Range(1, 10**7)] = 512
    seed: Natural = 0

    def __post_init__(self):
        require_ranges(self, "task")
        if not self.levels:
            raise ValueError("task.levels is empty; name at least one level")


@dataclass(frozen=True)
class RowsConfig:
    """The user's rows, and which of them become problems.

    Attributes:
      path: a JSONL, JSON, CSV, TSV or Parquet file, a directory of such files or one that Hugging Face's `save_to_disk`
        wrote, tfds:NAME (prepared by tensorflow-datasets), or hf:OWNER/NAME (on the hub); see
        `jaxrl_llm.data.row_files`. Replaces section task.
      validation_path, test_path: paths of these splits. None uses the splits of `path` with these names, or takes a
        tenth out of `path` by the hash of the prompt.
      format: default names of the columns, see `jaxrl_llm.data.jsonl.FORMATS`.
      fields: changes to these names, such as {prompt: problem, answer: solution, answer_from: boxed}; also jinja2
        templates of several columns, such as {prompt: "{{ question }} {{ options|join(', ') }}"}.
      verifier: how evaluation grades a file's problems: "number" compares the final number, "text" the final answer.
      where: conditions on the columns that rows must satisfy, such as "level|int < 3"; one or a list.
      limit: use only this many training problems, the first ones.
      duplicates: "keep", or "drop" rows whose prompt occurs in an earlier row of the split.
      unusable: rows without a readable prompt or answer are an "error"; "drop" leaves them out and counts them.
    """

    path: str | None = field(default=None, metadata=FREE)
    validation_path: str | None = field(default=None, metadata=FREE)
    test_path: str | None = field(default=None, metadata=FREE)
    format: Literal["gsm8k", "prompt", "messages"] = "prompt"
    fields: dict[str, Any] = field(default_factory=dict)
    verifier: Literal["number", "text"] = "number"
    where: str | tuple[str, ...] = ()
    limit: Count | None = None
    duplicates: Literal["keep", "drop"] = "keep"
    unusable: Literal["error", "drop"] = "error"


# Attributes of `RowsConfig` that need a path.
_OF_A_PATH = ("validation_path", "test_path", "fields", "where", "limit")


@dataclass(frozen=True)
class SourceConfig(RowsConfig):
    """One source of a mixture: the user's rows, or a built-in task.

    Attributes:
      task: a built-in task with single completions, instead of `path`.
      weight: its share of the prompts of a step, relative to the other weights; without any weights all problems occur
        equally often.
    """

    task: TaskConfig | None = None
    weight: Positive | None = None


@dataclass(frozen=True)
class FewShotConfig:
    """Solved problems before every prompt; the same for all prompts.

    Attributes:
      examples: number of examples.
      path: source of the examples, read like the rows of `data`; the first rows are used. None uses training problems,
        the first by the hash of their prompts, and does not train on them.
      template: jinja2 template of an example: `prompt` is the text in data.prompt_format, `answer` and `response` are
        the reference answer and completion (default: the answer); it can also read the columns.
    """

    examples: Natural = 0
    path: str | None = field(default=None, metadata=FREE)
    template: str = "{{ prompt }}\n{{ response }}\n\n"

    def __post_init__(self):
        require_ranges(self, "data.few_shot")


@dataclass(frozen=True)
class HandbookConfig:
    """Short named instructions, such as useful behaviours found by a model; each problem gets some of them.

    They become the column `handbook` of every problem, for prompt templates: `{{ handbook }}{body}`.

    Attributes:
      entries: name -> instruction.
      path: a file of further entries, with the columns `name`, `instruction` and, for `by`, `tag`; each name is used
          once.
      count: largest number of entries per problem.
      by: selects the entries: "similarity" the nearest by cosine similarity of word counts, "mention" those whose name
        occurs in the problem, or the name of a column whose value must equal their tag, such as domain.
      line: text of an entry, with {name} and {instruction}.
    """

    entries: dict[str, str] = field(default_factory=dict)
    path: str | None = field(default=None, metadata=FREE)
    count: Count = 40
    by: str = "similarity"
    line: str = "{name}: {instruction}\n"

    def __post_init__(self):
        require_ranges(self, "data.handbook")
        if not self.entries and self.path is None:
            raise ValueError("data.handbook has neither entries nor a path; give one of them, or leave it out")


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """The user's data set or a mixture, the format of prompts, and the treatment of unusable ones.

    Attributes:
      sources: a mixture, by name, instead of `path` and section task. Metrics are reported for each source.
      overlap: a prompt that occurs in two splits is an "error"; "drop" removes it from training and counts it.
      few_shot: solved problems before every prompt.
      templates: several wordings of every prompt: name -> text with `{body}`, which may be repeated, and columns of the
        row as in jinja2, such as `{body} Hint: {{ hint }}`. In training each problem occurs once in every wording, as
        separate problems with metrics for each wording; a selection can distinguish them (bandit: {arms: template}).
        Evaluations use the first.
      privileged: form of a training prompt for plans that sample after another prompt than they train on (`helped`,
        `under_view`): text with `{body}` and columns of the row, such as `{body}={{ answer }}`.
      response: text of demonstrations, instead of the reference completion: a template of columns, such as `{{
        think.split(';')[0] }}` for the first step only.
      handbook: instructions for problems, see `HandbookConfig`.
      prompts: with a checkpoint's tokenizer: "chat" renders its chat template, "plain" only the prompt format.
      prompt_format: text of the prompt (of the last user message in a chat) with `{body}` in place of the problem.
      system_prompt: first message of a chat.
      template_options: variables of the chat template, such as {enable_thinking: false}.
      rewritten_history: "error" refuses conversations whose earlier turns the template changes, "allow" accepts them.
      directory: cache of generated problems; None uses ~/.cache/jaxrl_llm (or XDG_CACHE_HOME).
      overlong_prompts: "error", or "drop" to leave them out and count them.
      selection: chooses the prompts of each step: a name of `jaxrl_llm.selection` with its hyper-parameters; null
        visits all prompts once per epoch, in a new order.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    overlap: Literal["error", "drop"] = "error"
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    templates: dict[str, str] = field(default_factory=dict)
    privileged: str | None = None
    response: str | None = None
    handbook: HandbookConfig | None = None
    prompts: Literal["chat", "plain"] = "plain"
    prompt_format: str = "{body}"
    system_prompt: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    rewritten_history: Literal["error", "allow"] = "error"
    directory: str | None = field(default=None, metadata=FREE)
    overlong_prompts: Literal["error", "drop"] = "error"
    selection: Any = None

    def __post_init__(self):
        require_ranges(self, "data")
        if self.path is None:
            for name in _OF_A_PATH:
                if value := getattr(self, name):
                    remedy = (
                        "set it in each of data.sources" if self.sources else "but data.path is not set; set it too"
                    )
                    raise ValueError(f"data.{name} is {value!r}, {remedy}")
        self._check_sources()
        for name in ("system_prompt", "template_options"):
            if self.prompts == "plain" and getattr(self, name):
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}, but data.prompts is 'plain', which has no chat template; "
                    "set data.prompts to chat, or write the text into data.prompt_format"
                )

    def _check_sources(self) -> None:
        for kind, name in [("source", name) for name in self.sources] + [("template", name) for name in self.templates]:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"data.{kind}s has a {kind} {name!r}; a name is made of letters, digits, _, - and .")
        for name, one in self.sources.items():
            if (one.path is None) == (one.task is None):
                found = "neither path nor task" if one.path is None else "path and task"
                raise ValueError(f"data.sources.{name} has {found}; give one of the two")
            if one.task is not None and (said := [key for key in _OF_A_PATH if getattr(one, key)]):
                raise ValueError(
                    f"data.sources.{name}.{said[0]} is set, but a task has no rows of a file; leave it out"
                )
            require_ranges(one, f"data.sources.{name}")
        if self.sources and self.path is not None:
            raise ValueError("data.path and data.sources are both set; make the file one of the sources")
        weighted = [name for name, one in self.sources.items() if one.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            missing = next(name for name in self.sources if name not in weighted)
            raise ValueError(f"data.sources.{missing} has no weight, but {weighted[0]} has; give all a weight, or none")
        if weighted and self.selection is not None:
            raise ValueError(
                f"data.selection chooses prompts, but the weights of data.sources ({weighted[0]}) do so too; leave "
                "one out"
            )


@dataclass(frozen=True)
class PretrainedConfig:
    """A model from a Hugging Face checkpoint; its shape is the checkpoint's.

    Attributes:
      path: a local directory, or owner/name of a Hugging Face repository (needs the extra hf).
      revision: branch, tag or commit of a repository.
      attention, layer_loop, parameter_dtype, compute_dtype: as for a model described by its shape.
      strict: refuse weights that are NaN or infinite; otherwise a warning is printed.
    """

    path: str = field(metadata=FREE)
    revision: str | None = field(default=None, metadata=FREE)
    attention: AttentionChoice = "auto"
    layer_loop: LayerLoop = "auto"
    parameter_dtype: Precision = "float32"
    compute_dtype: Precision = "float32"
    strict: bool = field(default=False, metadata=FREE)

    @property
    def execution(self) -> dict[str, Any]:
        """The settings that the checkpoint does not determine."""
        names = ("attention", "layer_loop", "parameter_dtype", "compute_dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BranchConfig:
    """Another run whose policy is the initial policy; if the adapters of the two runs differ, its adapters are merged.

    Attributes:
      path: directory of the run, or of one of its checkpoints.
      step: of the checkpoint; None uses the newest. `RUN@step` abbreviates both.
      optimizer: the first stage that runs also continues with the optimiser's moments and its count of updates, which
        schedules read; the optimiser must be the same.
      warm_start: run the warm start (section `warm_start`) over this policy, too; without it the run begins after it.
    """

    path: str
    step: Natural | None = None
    optimizer: bool = False
    warm_start: bool = False

    def __post_init__(self):
        require_ranges(self, "init_from")


def model_kind(value: Any) -> str:
    path = value.get("path") if isinstance(value, Mapping) else isinstance(value, PretrainedConfig)
    return "checkpoint" if path else "shape"


MODEL_KINDS = {"shape": TransformerConfig, "checkpoint": PretrainedConfig}
ModelConfig = Annotated[
    Annotated[TransformerConfig, pydantic.Tag("shape")] | Annotated[PretrainedConfig, pydantic.Tag("checkpoint")],
    pydantic.Discriminator(model_kind),
]


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on reference solutions before reinforcement; with 0 steps there are none.

    Attributes:
      steps: at most this many updates. A run that starts from another one (`init_from`) makes none, unless
        `init_from.warm_start` is true.
      sequences_per_step: demonstrations in a batch.
      learning_rate: peak, reached after `warmup_steps`, then constant.
      warmup_steps: steps of the linear rise.
      probe_every_steps: steps between measurements of sampled accuracy on the validation split; 0: never.
      stop_at_accuracy: stop at the first probe that reaches it; None runs all steps.
    """

    steps: Natural = 0
    sequences_per_step: Count = 64
    learning_rate: NonNegative = 1e-3
    warmup_steps: Natural = 20
    probe_every_steps: Natural = 0
    stop_at_accuracy: Share | None = None

    def __post_init__(self):
        require_ranges(self, "warm_start")
        if self.stop_at_accuracy is not None and not self.probe_every_steps:
            raise ValueError(
                f"warm_start.stop_at_accuracy is {self.stop_at_accuracy}, but warm_start.probe_every_steps is 0, so "
                "accuracy is never measured; set warm_start.probe_every_steps"
            )
