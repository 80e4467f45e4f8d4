"""The top-level config.

Units are in the names: `prompts_per_step` counts prompts, `sequences_per_microbatch` counts completions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from jaxrl_llm.addresses import is_address, working_directory
from jaxrl_llm.config.errors import FREE, PLACEMENT
from jaxrl_llm.config.inputs import BranchConfig, DataConfig, ModelConfig, TaskConfig, WarmStartConfig
from jaxrl_llm.config.method import AdapterConfig, NetworkConfig, RolloutConfig, TrainingConfig
from jaxrl_llm.config.operation import (
    AboutConfig,
    CheckpointConfig,
    Direction,
    EvaluationConfig,
    FaultsConfig,
    MeshConfig,
    ReportingConfig,
)
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.ranges import Range, require_ranges

_MOST_TOKENS = 2**40  # per step
# Keys that a stage cannot set.
_OF_THE_RUN = (
    "model",
    "lora",
    "mesh",
    "warm_start",
    "stages",
    "init_from",
    "run_dir",
    "checkpoints",
    "faults",
    "reporting",
    "about",
    "shows",
)


@dataclass(frozen=True)
class Config:
    """A whole run.

    `init_from: RUN` or `RUN@step` starts it from the policy of another run, see `BranchConfig`.

    `environment` holds options of the environment of a task in turns such as grid; or `python: "module:function"` with
    the keyword arguments of that function, which is called with the tokenizer and returns the user's environment.
    `executor` (process, sandbox or thread) decides where an environment in Python is called, and fields of
    `HostEnvironment` that the function does not take, such as `deadline_seconds` and `on_failure`, how. null removes
    the environment, in a stage whose task has single completions.
    """

    name: str = field(metadata=FREE)
    model: ModelConfig
    losses: tuple[Any, ...] = ()
    rewards: tuple[Any, ...] = ()
    credit: tuple[dict[str, Any], ...] = ()
    task: TaskConfig | None = None
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    init_from: BranchConfig | None = None
    run_dir: str | None = field(default=None, metadata=FREE)
    about: AboutConfig = field(default=AboutConfig(), metadata=FREE)
    shows: dict[str, Direction] = field(default_factory=dict, metadata=FREE)
    data: DataConfig = field(default_factory=DataConfig)
    environment: dict[str, Any] | None = field(default_factory=dict)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: AdapterConfig | None = None
    networks: dict[str, NetworkConfig] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    source: tuple[Any, ...] = ("sampler",)
    stages: tuple[dict[str, Any], ...] = ()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointConfig = field(default=CheckpointConfig(), metadata=FREE)
    faults: FaultsConfig = field(default=FaultsConfig(), metadata=FREE)
    reporting: ReportingConfig = field(default=ReportingConfig(), metadata=FREE)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=PLACEMENT)

    def __post_init__(self):
        require_ranges(self, "")
        sizes = self.rollout
        tokens = sizes.samples_per_prompt * (sizes.max_prompt_tokens + sizes.max_completion_tokens)
        if (step := tokens * self.training.prompts_per_step) > _MOST_TOKENS:
            raise ValueError(
                f"a step has {step:,} tokens (training.prompts_per_step times rollout.samples_per_prompt times the "
                f"longest sequence), more than {_MOST_TOKENS:,}; lower one of them"
            )
        for stage in self.stages:
            if of_run := [name for name in _OF_THE_RUN if name in stage]:
                raise ValueError(
                    f"stage {stage.get('name', '')!r} sets {of_run[0]}, which all stages of a run share; set it at the "
                    "top level, beside section stages"
                )
        if self.task is not None and (self.data.path is not None or self.data.sources):
            raise ValueError(
                f"task and data.{'sources' if self.data.sources else 'path'} are both set; name a built-in task in "
                "section task, or your own file in data.path, or make each of them one of data.sources"
            )
        if self.training.bfloat16_update != "nearest" and self.model.parameter_dtype != "bfloat16":
            raise ValueError(
                f"training.bfloat16_update is {self.training.bfloat16_update!r}, but model.parameter_dtype is "
                f"{self.model.parameter_dtype!r}; set it to bfloat16, or leave training.bfloat16_update out"
            )
        if self.data.prompt_format != "{body}" and isinstance(self.model, TransformerConfig):
            raise ValueError(
                f"data.prompt_format is {self.data.prompt_format!r}, but a model described by its shape uses the "
                "bodies of its problems as prompts; set model.path to a checkpoint, or leave data.prompt_format out"
            )
        if self.data.prompts == "chat" and isinstance(self.model, TransformerConfig):
            raise ValueError(
                "data.prompts is 'chat', but a model described by its shape has no chat template; set "
                "model.path to a checkpoint, or data.prompts to plain"
            )

    @property
    def warm_start_steps(self) -> int:
        """Steps of the warm start of this run: none over the policy of another run, unless it asks for them."""
        return self.warm_start.steps if self.init_from is None or self.init_from.warm_start else 0

    @property
    def has_problems(self) -> bool:
        """Whether there are problems for training and evaluation."""
        return self.task is not None or self.data.path is not None or bool(self.data.sources)

    @property
    def directory(self) -> Path:
        """The run directory on this machine; for a run at an address, the local working copy."""
        return working_directory(self.place) if is_address(self.place) else Path(self.place)

    @property
    def place(self) -> str:
        """The directory or address of the run."""
        return self.run_dir or f"runs/{self.name}"
