"""Sections of what a run starts from: problems, data, the model, and the phase on worked answers before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic

from jaxrl_llm.config.errors import FREE
from jaxrl_llm.models.attention import AttentionChoice
from jaxrl_llm.models.transformer_config import LayerLoop, Precision, TransformerConfig
from jaxrl_llm.ranges import Count, Natural, NonNegative, Range, Share, require_ranges


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
class DataConfig:
    """A data set of the user's own, what prompts look like, and what to do with those that do not fit.

    Attributes:
      path: a JSONL or JSON file; takes the place of section task.
      validation_path, test_path: files of these splits; None cuts a tenth of `path` out by hash.
      format: what the fields of a line are called, see `jaxrl_llm.data.jsonl.FORMATS`.
      fields: changes to them, such as {prompt: problem, answer: solution, answer_from: boxed}.
      verifier: how evaluation grades a file's problems: "number" compares the final number, "text" the final answer.
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

    path: str | None = field(default=None, metadata=FREE)
    validation_path: str | None = field(default=None, metadata=FREE)
    test_path: str | None = field(default=None, metadata=FREE)
    format: Literal["gsm8k", "prompt", "messages"] = "prompt"
    fields: dict[str, Any] = field(default_factory=dict)
    verifier: Literal["number", "text"] = "number"
    prompts: Literal["chat", "plain"] = "plain"
    prompt_format: str = "{body}"
    system_prompt: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    rewritten_history: Literal["error", "allow"] = "error"
    directory: str | None = field(default=None, metadata=FREE)
    overlong_prompts: Literal["error", "drop"] = "error"
    selection: Any = None

    def __post_init__(self):
        if self.path is None:
            for name in ("validation_path", "test_path", "fields"):
                if getattr(self, name):
                    raise ValueError(f"data.{name} is {getattr(self, name)!r}, but data.path is not set; set it too")
        for name in ("system_prompt", "template_options"):
            if self.prompts == "plain" and getattr(self, name):
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}, but data.prompts is 'plain', which has no chat template; "
                    "set data.prompts to chat, or write the text into data.prompt_format"
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
