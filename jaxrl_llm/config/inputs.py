"""Sections of what a run starts from: problems, data, the model, and the phase on worked answers before it."""

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
      levels: difficulty levels, mixed in equal parts.
      options: keyword options of the task.
      train_items, validation_items, test_items: problems in each split; splits never overlap.
      seed: of the generator.
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
    """Rows of the user's own, and which of them become problems.

    Attributes:
      path: a JSONL, JSON, CSV, TSV or Parquet file, a directory of such files or one that Hugging Face's `save_to_disk`
        wrote, tfds:NAME (prepared by tensorflow-datasets), or hf:OWNER/NAME (of the hub); see
        `jaxrl_llm.data.row_files`. Takes the place of section task.
      validation_path, test_path: of these splits. None takes the splits that `path` has by name, or cuts a tenth out of
        it by hash.
      format: what the columns of a row are called, see `jaxrl_llm.data.jsonl.FORMATS`.
      fields: changes to them, such as {prompt: problem, answer: solution, answer_from: boxed}. Also templates of jinja2
        made of several columns, such as {prompt: "{{ question }} {{ options|join(', ') }}"}.
      verifier: how evaluation grades a file's problems: "number" compares the final number, "text" the final answer.
      where: conditions on the columns that rows have to meet, such as "level|int < 3", one or a list.
      limit: training problems at most, the first ones.
      duplicates: "keep", or "drop" for prompts that an earlier row of the split has.
      unusable: rows without a prompt or an answer that can be read are an "error"; "drop" leaves them out and counts.
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


# Of `RowsConfig`: says something about a path.
_OF_A_PATH = ("validation_path", "test_path", "fields", "where", "limit")


@dataclass(frozen=True)
class SourceConfig(RowsConfig):
    """One source of a mixture: rows of the user's own, or a built-in task.

    Attributes:
      task: a built-in task, answered in one completion, in place of `path`.
      weight: its share of the prompts of a step, relative to the weights of the others; left out in all of them, all
        problems come equally often.
    """

    task: TaskConfig | None = None
    weight: Positive | None = None


@dataclass(frozen=True)
class FewShotConfig:
    """Solved problems before every prompt, the same before all.

    Attributes:
      examples: how many.
      path: where they come from, rows that are read as those of `data`, of which the first are taken; None takes
        training problems, the first by the hash of their prompts, which are not trained on then.
      template: text of an example, a template of jinja2: `prompt` is the text in data.prompt_format, `answer` and
        `response` are the reference answer and completion (the answer where there is none), and the columns are there.
    """

    examples: Natural = 0
    path: str | None = field(default=None, metadata=FREE)
    template: str = "{{ prompt }}\n{{ response }}\n\n"

    def __post_init__(self):
        require_ranges(self, "data.few_shot")


@dataclass(frozen=True)
class HandbookConfig:
    """Short instructions by name, such as behaviours that a model has found useful, of which each problem gets some.

    They are the column `handbook` of every problem, for templates of prompts: `{{ handbook }}{body}`.

    Attributes:
      entries: name -> instruction.
      path: further ones, a file whose rows have `name`, `instruction` and, for `by`, `tag`; a name counts once.
      count: entries that a problem gets at most.
      by: what chooses them: "similarity" the nearest by the cosine of word counts, "mention" those whose name stands in
        the problem, or a column of the problem that their tag is equal to, such as domain.
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
    """A data set of the user's own or a mixture, what prompts look like, and what to do with those that do not fit.

    Attributes:
      sources: a mixture, by name, in place of `path` and of section task. Metrics are told for each source.
      overlap: a prompt that stands in two splits is an "error", or is taken out of training, "drop", and counted.
      few_shot: solved problems before every prompt.
      templates: several wordings of every prompt, name -> text with `{body}`, as often as it is to be read, and columns
        of the row as in jinja2, such as `{body} Hint: {{ hint }}`. Training has each problem once in every one of them,
        as problems of their own, and metrics for each; a selection may tell them apart (bandit: {arms: template}).
        Evaluations have the first.
      privileged: what the prompt of a training problem is for plans that sample behind more than is learned behind
        (`helped`, `under_view`): text with `{body}`, and columns of the row, such as `{body}={{ answer }}`.
      response: what a demonstration says, in the place of the reference completion: text with columns of the row, such
        as `{{ think.split(';')[0] }}` for its first step alone.
      handbook: instructions of which each problem gets some.
      prompts: with a checkpoint's tokenizer: "chat" renders its chat template, "plain" the prompt format alone.
      prompt_format: text of the prompt (of the last user message in a chat) with `{body}` where the problem goes.
      system_prompt: first message of a chat.
      template_options: variables of the chat template, such as {enable_thinking: false}.
      rewritten_history: "error" refuses conversations whose earlier turns the template changes, "allow" takes them.
      directory: where generated problems are kept; None takes ~/.cache/jaxrl_llm (or XDG_CACHE_HOME).
      overlong_prompts: "error", or "drop" to leave them out and report how many.
      selection: what chooses the prompts of a step, a name of `jaxrl_llm.selection` with its hyper-parameters; null
        takes them in a new order each epoch.
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
                f"data.selection chooses prompts, and so do the weights of data.sources ({weighted[0]}); leave one out"
            )


@dataclass(frozen=True)
class PretrainedConfig:
    """A model from a Hugging Face checkpoint; its shape is the checkpoint's.

    Attributes:
      path: a local directory, or owner/name of a repository (needs the extra hf).
      revision: branch, tag or commit of a repository.
      attention, layer_loop, parameter_dtype, compute_dtype: as for a model that is described by its shape.
      strict: refuse weights that are NaN or infinite; without it they are warned of.
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
        """What is not the checkpoint's."""
        names = ("attention", "layer_loop", "parameter_dtype", "compute_dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BranchConfig:
    """Another run whose policy a run starts from, whatever its model is: adapters are merged where this run has others.

    Attributes:
      path: directory of the run, or of one of its checkpoints.
      step: of the checkpoint; None takes the newest. `RUN@step` is short for both.
      optimizer: the optimiser's moments are taken along, and its count of updates with them, which schedules read; the
        optimiser must be the same.
    """

    path: str
    step: Natural | None = None
    optimizer: bool = False

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
    """Supervised steps on reference solutions before reinforcement. 0 steps skips the stage.

    Attributes:
      steps: at most this many updates.
      sequences_per_step: demonstrations in a batch.
      learning_rate: peak, reached after `warmup_steps`, then constant.
      warmup_steps: linear rise.
      probe_every_steps: how often sampled accuracy is measured on the validation split; 0 never.
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
