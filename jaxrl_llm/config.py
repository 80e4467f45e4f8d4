"""Configuration: typed frozen dataclasses, read from YAML, with dotted overrides and errors that suggest a remedy.

Units are in the names: `prompts_per_step` counts prompts, `sequences_per_microbatch` counts completions.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pydantic
import yaml

from jaxrl_llm.models.attention import AttentionChoice
from jaxrl_llm.models.lora import LoraConfig
from jaxrl_llm.models.transformer_config import LayerLoop, Precision, Rematerialisation, TransformerConfig
from jaxrl_llm.parallel.rules import AXES, changed_rules
from jaxrl_llm.rollout.controls import Controls


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field, the value and the remedy."""


# Of a field that decides no number of a run: it may be another when the run is resumed.
FREE = {"decides_numbers": False}


def _at_least(owner: str, config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{owner}.{name} is {value}; it must be at least {minimum}")


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
    train_items: int = 8192
    validation_items: int = 256
    test_items: int = 512
    seed: int = 0

    def __post_init__(self):
        _at_least("task", self, 1, "train_items", "validation_items", "test_items")
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
    """

    path: str = field(metadata=FREE)
    revision: str | None = field(default=None, metadata=FREE)
    attention: AttentionChoice = "auto"
    layer_loop: LayerLoop = "auto"
    parameter_dtype: Precision = "float32"
    compute_dtype: Precision = "float32"

    @property
    def execution(self) -> dict[str, Any]:
        """What is not the checkpoint's."""
        names = ("attention", "layer_loop", "parameter_dtype", "compute_dtype")
        return {name: getattr(self, name) for name in names}


def _model_kind(value: Any) -> str:
    path = value.get("path") if isinstance(value, Mapping) else isinstance(value, PretrainedConfig)
    return "checkpoint" if path else "shape"


_MODEL_KINDS = {"shape": TransformerConfig, "checkpoint": PretrainedConfig}
ModelConfig = Annotated[
    Annotated[TransformerConfig, pydantic.Tag("shape")] | Annotated[PretrainedConfig, pydantic.Tag("checkpoint")],
    pydantic.Discriminator(_model_kind),
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

    steps: int = 0
    sequences_per_step: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    probe_every_steps: int = 0
    stop_at_accuracy: float | None = None

    def __post_init__(self):
        _at_least("warm_start", self, 0, "steps", "warmup_steps", "probe_every_steps")
        _at_least("warm_start", self, 1, "sequences_per_step")
        if self.stop_at_accuracy is not None and not self.probe_every_steps:
            raise ValueError(
                f"warm_start.stop_at_accuracy is {self.stop_at_accuracy}, but warm_start.probe_every_steps is 0, so "
                "accuracy is never measured; set warm_start.probe_every_steps"
            )


@dataclass(frozen=True)
class EngineConfig:
    """An OpenAI-compatible engine that samples the completions of training; docs/engines.md says how it is launched.

    Attributes:
      url: root of the engine, such as http://localhost:8000.
      model: the name that it serves the policy under.
      timeout_s: deadline of one request in seconds.
      concurrency: requests under way at once.
      retries: further attempts after a failed connection or a passing HTTP status.
      api_key_variable: environment variable that holds the key.
      request: further fields of every request.
      probe_prompts: prompts of the first batch that the engine's log-probabilities are compared on.
      probe_bound: highest mean difference from ours, in nats.
      probe_largest_bound: highest difference of a single token.
      weights_directory: where the policy is exported to, under a path that the engine sees too.
      reload_path: address that makes the engine load it.
      reload_body: what is sent there; {directory} stands for the exported directory.
      reload_then: addresses that are called after it, with an empty body.
      reload_every_steps: steps from one export to the next; 0 leaves the engine with the weights it was launched with.
    """

    url: str = field(metadata=FREE)
    model: str = field(metadata=FREE)
    timeout_s: float = field(default=600.0, metadata=FREE)
    concurrency: int = field(default=64, metadata=FREE)
    retries: int = field(default=3, metadata=FREE)
    api_key_variable: str | None = field(default=None, metadata=FREE)
    request: dict[str, Any] = field(default_factory=dict)
    probe_prompts: int = field(default=8, metadata=FREE)
    probe_bound: float = field(default=0.05, metadata=FREE)
    probe_largest_bound: float = field(default=1.0, metadata=FREE)
    weights_directory: str | None = field(default=None, metadata=FREE)
    reload_path: str | None = field(default=None, metadata=FREE)
    reload_body: dict[str, Any] = field(default_factory=lambda: {"model_path": "{directory}"}, metadata=FREE)
    reload_then: tuple[str, ...] = field(default=(), metadata=FREE)
    reload_every_steps: int = 1

    def __post_init__(self):
        _at_least("rollout.engine", self, 1, "concurrency", "probe_prompts")
        _at_least("rollout.engine", self, 0, "retries", "reload_every_steps", "probe_bound", "probe_largest_bound")
        for name in ("weights_directory", "reload_path"):
            if self.reload_every_steps and getattr(self, name) is None:
                raise ValueError(
                    f"rollout.engine.{name} is missing, so the engine would go on sampling from the weights that it "
                    "was launched with; set it, or set rollout.engine.reload_every_steps to 0 to have it so"
                )
            if not self.reload_every_steps and getattr(self, name) is not None:
                raise ValueError(
                    f"rollout.engine.{name} is {getattr(self, name)!r}, but rollout.engine.reload_every_steps is 0, "
                    "which hands no weights over; leave one of them out"
                )


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled.

    Attributes:
      samples_per_prompt: completions for each prompt of a step.
      max_prompt_tokens: prompts are padded to this; a longer one is an error (or dropped, see data).
      prompt_buckets: smaller widths; a step takes the smallest one that holds all of its prompts. True takes powers of
        two. Each width that occurs is a program more; `jaxrl explain` lists them.
      max_completion_tokens: longest completion, end of sequence included.
      temperature: of the softmax, in sampling and in training alike.
      plan: how completions are asked for, from the inside out: names of `jaxrl_llm.rollout.plans` with their
        hyper-parameters, such as {refill: {max_rounds: 10}}; empty draws all at once.
      replay_router: a mixture of experts learns through the experts that sampled each token.
      engine: samples in another process; None samples here.
      slots: completions that are decoded at a time, so that short ones make room for others; None decodes all of a step
        side by side.
      top_k, top_p, min_p: truncated sampling in training; it needs top_k and `renormalised`.
      renormalised: samples and trainer compute over the tokens that each one was drawn from, renormalised. Without it
        truncated sampling is refused, because the policy that is trained would be another than the one that sampled.
      off_policy_steps: 1 samples the next batch with the policy that this step starts from, beside the update; 0 after
        it.
    """

    samples_per_prompt: int = 8
    max_prompt_tokens: int = 32
    prompt_buckets: bool | tuple[int, ...] = False
    max_completion_tokens: int = 64
    temperature: float = 1.0
    plan: tuple[Any, ...] = ()
    replay_router: bool = False
    engine: EngineConfig | None = None
    slots: int | None = None
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    renormalised: bool = False
    off_policy_steps: Literal[0, 1] = 0

    def __post_init__(self):
        _at_least("rollout", self, 1, "samples_per_prompt", "max_prompt_tokens", "max_completion_tokens", "slots")
        if self.truncation is not None and not self.renormalised:
            raise ValueError(
                "rollout.top_k, top_p or min_p is set, but samples and trainer must have the same support; set "
                "rollout.renormalised to true to train the truncated distribution, or leave them out"
            )
        if self.renormalised and self.truncation is None:
            raise ValueError(
                "rollout.renormalised is true, but nothing is truncated; set rollout.top_k or leave it out"
            )
        widths = () if isinstance(self.prompt_buckets, bool) else self.prompt_buckets
        if unfit := [width for width in widths if not 1 <= width <= self.max_prompt_tokens]:
            raise ValueError(
                f"rollout.prompt_buckets holds {unfit[0]}, but the widths of prompts lie between 1 and "
                f"rollout.max_prompt_tokens {self.max_prompt_tokens}; take it out, or raise the limit"
            )
        if self.prompt_buckets and self.off_policy_steps:
            raise ValueError(
                "rollout.off_policy_steps keeps a batch that waits in the state, whose prompts have one width "
                "(one_width); leave rollout.prompt_buckets or rollout.off_policy_steps out"
            )

    @property
    def truncation(self) -> Controls | None:
        """What is cut off the distribution that samples are drawn from."""
        controls = Controls(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return controls if controls.truncates else None


@dataclass(frozen=True)
class TrainingConfig:
    """Reinforcement: how many steps, how a batch is cut, the optimiser, and what saves memory.

    Attributes:
      steps: reinforcement steps; each samples one batch.
      prompts_per_step: groups in a batch.
      epochs_per_batch: passes over a batch.
      minibatches_per_epoch: optimiser updates a pass.
      sequences_per_microbatch: completions differentiated at once; None takes a whole minibatch.
      learning_rate: peak.
      warmup_steps: linear rise, in optimiser updates.
      schedule: after the rise: constant, or cosine to a tenth of the peak.
      optimizer: adamw, adafactor, muon (AdamW for what is no matrix), lion or sgd.
      weight_decay: of every optimiser.
      adam_b1, adam_b2: of AdamW and lion; muon takes adam_b2 for its momentum.
      moment_dtype: dtype of first moments; None is that of the parameters.
      bfloat16_update: how a step reaches parameters of bfloat16: rounded to the nearest number, by way of a float32
        copy ("master"), or rounded up or down at random ("stochastic").
      remat: what of a block's forward pass is computed again in the backward pass instead of kept: none, full (all of
        it), dots (all but matrix products), attention (all but what attention returns), offload_dots (as dots, and the
        products wait in the host's memory).
      offload: what is kept in the host's memory between its uses: optimizer, reference.
      max_gradient_norm: global norm clip.
      freeze_policy_steps: first steps in which only other networks learn.
      alignment_every_steps: steps between two measurements of `alignment`, which takes three more gradients; 0 never
        measures it.
    """

    steps: int = 100
    prompts_per_step: int = 32
    epochs_per_batch: int = 1
    minibatches_per_epoch: int = 1
    sequences_per_microbatch: int | None = None
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "adafactor", "muon", "lion", "sgd"] = "adamw"
    weight_decay: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    moment_dtype: Precision | None = None
    bfloat16_update: Literal["nearest", "master", "stochastic"] = "nearest"
    remat: Rematerialisation = "none"
    offload: tuple[Literal["optimizer", "reference"], ...] = ()
    max_gradient_norm: float = 1.0
    freeze_policy_steps: int = 0
    alignment_every_steps: int = 0

    def __post_init__(self):
        _at_least("training", self, 0, "steps", "warmup_steps", "learning_rate")
        _at_least("training", self, 0, "freeze_policy_steps", "alignment_every_steps")
        if self.optimizer == "adafactor" and self.moment_dtype is not None:
            raise ValueError(
                f"training.moment_dtype is {self.moment_dtype!r}, but adafactor keeps no first moments; leave it out"
            )
        _at_least("training", self, 1, "prompts_per_step", "epochs_per_batch", "minibatches_per_epoch")
        _at_least("training", self, 1, "sequences_per_microbatch")


@dataclass(frozen=True)
class NetworkConfig:
    """A network beside the policy. The names that functions ask for say which are made; this says how.

    A reference is a copy of the policy, and networks with a head (value, twin, token_reward) learn from one, where this
    says nothing else.

    Attributes:
      origin: `from` in a config. "policy" copies the policy that a stage starts from, or the name of another network.
      path: a checkpoint: a run, or a directory of Hugging Face; takes the place of `origin`.
      of: of a run, which of its networks; None takes the one of the same name.
      head: numbers instead of log-probabilities: "scalar", or {outputs, layers, width, initial_scale}.
      says: of a head's values, one a "token", or the one at the "first" token of a row that is trained on.
      backbone: of a head: "own" starts as a copy of the policy; "shared" reads the policy's hidden states, which then
        learn from its loss too.
      learns: it has an optimiser, AdamW; None says yes for a head that is made from the policy.
      learning_rate: constant.
      max_gradient_norm: global norm clip.
      decay: it follows its origin as a moving average that keeps this share at each step.
      copy_every: steps between copies of its origin; 0 never.
      copy_at: steps after which its origin is copied, beside those.
      temperature: of its log-probabilities; None is that of the rollout.
      always_origin: it is its origin at every moment: the policy at another temperature.
      parameter_dtype, compute_dtype: of one that is read from a directory of Hugging Face.
    """

    origin: str = "policy"
    path: str | None = None
    of: str | None = None
    head: Literal["scalar"] | dict[str, Any] | None = None
    says: Literal["token", "first"] = "token"
    backbone: Literal["own", "shared"] = "own"
    learns: bool | None = None
    learning_rate: float = 1e-3
    max_gradient_norm: float = 1.0
    decay: float | None = None
    copy_every: int = 0
    copy_at: tuple[int, ...] = ()
    temperature: float | None = None
    always_origin: bool = False
    parameter_dtype: Precision = "float32"
    compute_dtype: Precision = "float32"

    def __post_init__(self):
        _at_least("networks", self, 0, "learning_rate", "max_gradient_norm", "copy_every")
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise ValueError(
                f"networks: decay is {self.decay}; it is the share that is kept at each step and must lie in [0, 1]"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"networks: temperature is {self.temperature}; it must be above 0")


@dataclass(frozen=True)
class AdapterConfig(LoraConfig):
    """Low-rank adapters (LoRA) are all that learns of the policy; rank, alpha, targets and rank_stabilised as there.

    Attributes:
      int8: the matrices under the adapters are stored in int8.
    """

    int8: bool = False


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy and sampled accuracy on the test split, before and after training.

    Attributes:
      problems: test problems used, and validation problems in probes; at most as many as there are.
      samples_per_problem: sampled completions for each problem; pass@k needs k of them.
      k: the k of pass@k and maj@k.
      temperature: of the sampled completions.
      sequences_per_batch: completions decoded together.
      every_steps: evaluate on the validation split every so many steps; 0 only before and after.
    """

    problems: int = 512
    samples_per_problem: int = 8
    k: tuple[int, ...] = (1, 8)
    temperature: float = 1.0
    sequences_per_batch: int = 1152
    every_steps: int = 0

    def __post_init__(self):
        _at_least("evaluation", self, 1, "problems", "samples_per_problem", "sequences_per_batch")
        _at_least("evaluation", self, 0, "every_steps")
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples_per_problem:
            raise ValueError(
                f"evaluation.k is {list(self.k)}, but evaluation.samples_per_problem is {self.samples_per_problem}; "
                "every k must lie between 1 and the number of samples"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the whole state is written, and how many are kept."""

    every_steps: int = 20
    keep: int = 2

    def __post_init__(self):
        _at_least("checkpoints", self, 1, "every_steps", "keep")


@dataclass(frozen=True)
class ReportingConfig:
    """What is written besides metrics.

    Attributes:
      samples_every_steps: write completions with their rewards every so many steps; 0 never.
      samples_per_report: completions written each time.
    """

    samples_every_steps: int = 10
    samples_per_report: int = 8


@dataclass(frozen=True)
class MeshConfig:
    """The devices of a run, as a mesh. With no size named (or `mesh: auto`) sizes are chosen, and the choice is shown.

    Attributes:
      devices: how many are used; None takes all that there are.
      data: replicas of the parameters, which share the rows of a batch.
      fsdp: devices that share rows and parameters: each keeps a part of every matrix, and gathers it for its use.
      tensor: devices that share each matrix product; divides model.kv_heads and the width of the MLP.
      sequence: devices that share the positions of each row.
      expert: devices that share the experts of a mixture; divides model.experts.count.
      slices: TPU slices, between which the network is slow; each holds replicas.
      rules: changes to the table from the names of array axes to mesh axes, such as {mlp: [tensor, fsdp]}.
      gather_for_rollout: sampling gathers the parameters once a rollout, which needs memory for those that `tensor` and
        `expert` do not split; false gathers them for each token.
    """

    devices: int | None = None
    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    sequence: int | None = None
    expert: int | None = None
    slices: int | None = None
    rules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gather_for_rollout: bool = True

    def __post_init__(self):
        _at_least("mesh", self, 1, "data", "fsdp", "tensor", "sequence", "expert", "slices")
        changed_rules(self.rules)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by mesh axis, of those that are named."""
        named = {axis: getattr(self, "slices" if axis == "slice" else axis) for axis in AXES}
        return {axis: size for axis, size in named.items() if size is not None}


@dataclass(frozen=True)
class AboutConfig:
    """Where a recipe comes from; shown by `jaxrl methods`."""

    paper: str = ""
    arxiv: str = ""
    stage: str = ""
    certainty: Literal["verified", "recalled", "reconstructed", ""] = ""


# What a stage cannot have of its own.
_OF_THE_RUN = ("model", "lora", "mesh", "warm_start", "stages", "run_dir", "checkpoints", "reporting", "about")


@dataclass(frozen=True)
class Config:
    """A whole run. Everything but `run_dir` and `reporting` decides the numbers.

    `environment` holds options of the environment that answers the turns of a task such as grid; or
    `python: "module:function"` and the keyword arguments of that function, which is called with the tokenizer and
    returns an environment of the user's own.
    """

    name: str = field(metadata=FREE)
    model: ModelConfig
    losses: tuple[Any, ...] = ()
    rewards: tuple[Any, ...] = ()
    credit: tuple[dict[str, Any], ...] = ()
    task: TaskConfig | None = None
    seed: int = 0
    run_dir: str | None = field(default=None, metadata=FREE)
    about: AboutConfig = field(default=AboutConfig(), metadata=FREE)
    data: DataConfig = DataConfig()
    environment: dict[str, Any] = field(default_factory=dict)
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    lora: AdapterConfig | None = None
    networks: dict[str, NetworkConfig] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    source: tuple[Any, ...] = ("sampler",)
    stages: tuple[dict[str, Any], ...] = ()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = field(default=CheckpointConfig(), metadata=FREE)
    reporting: ReportingConfig = field(default=ReportingConfig(), metadata=FREE)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if "://" in (self.run_dir or ""):
            raise ValueError(
                f"run_dir is {self.run_dir!r}, an address, but a run is written to local files; give a local or "
                "mounted directory, and copy it to the bucket when the run is over"
            )
        for stage in self.stages:
            if of_run := [name for name in _OF_THE_RUN if name in stage]:
                raise ValueError(
                    f"stage {stage.get('name', '')!r} sets {of_run[0]}, which all stages of a run share; set it beside "
                    "section stages"
                )
        if self.task is not None and self.data.path is not None:
            raise ValueError(
                "task and data.path are both set; name a built-in task in section task, or a file of your own in "
                "data.path"
            )
        if self.training.bfloat16_update != "nearest" and self.model.parameter_dtype != "bfloat16":
            raise ValueError(
                f"training.bfloat16_update is {self.training.bfloat16_update!r}, but model.parameter_dtype is "
                f"{self.model.parameter_dtype!r}; set it to bfloat16, or leave training.bfloat16_update out"
            )
        if self.data.prompts == "chat" and isinstance(self.model, TransformerConfig):
            raise ValueError(
                "data.prompts is 'chat', but a model that is described by its shape has no chat template; set "
                "model.path to a checkpoint, or data.prompts to plain"
            )

    @property
    def has_problems(self) -> bool:
        """Whether there are problems to train on and to be measured on."""
        return self.task is not None or self.data.path is not None

    @property
    def directory(self) -> Path:
        """Where the run is written."""
        return Path(self.run_dir or f"runs/{self.name}")


def load_config(path: str | Path, overrides: Sequence[str] = (), **defaults: Any) -> Config:
    """Read a YAML file, follow `extends`, apply `section.key=value` overrides, and check every name and type.

    Args:
      path: the file.
      overrides: dotted assignments; values are YAML.
      defaults: model fields that the caller knows (vocabulary_size) and the file need not name.

    Raises:
      ConfigError: naming the field, the value and the remedy.
    """
    return parse_config(read_tree(Path(path)), overrides, **defaults)


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), **model_defaults: Any) -> Config:
    """A `Config` from plain dictionaries, as `load_config` does from a file."""
    values: dict[str, Any] = _copied(tree)
    for override in overrides:
        _assign(values, override)
    if values.get("mesh") == "auto":
        values["mesh"] = {}
    for name in ("source", "stages"):  # one entry needs no list
        if name in values and not isinstance(values[name], list):
            values[name] = [values[name]]
    rollout = values.get("rollout")
    if isinstance(rollout, dict) and not isinstance(rollout.get("plan", []), list):
        plan: Any = rollout["plan"] or {}
        several = isinstance(plan, dict) and "python" not in plan
        rollout["plan"] = [{name: hyper} for name, hyper in plan.items()] if several else [plan]
    networks = values.get("networks")
    if isinstance(networks, dict):
        values["networks"] = {name: _with_origin(network) for name, network in networks.items()}
    if isinstance(values.get("model"), dict) and _model_kind(values["model"]) == "checkpoint":
        _refuse_shape(values["model"])
    elif isinstance(values.get("model"), dict):
        values["model"] = model_defaults | {k: v for k, v in values["model"].items() if (k, v) != ("path", None)}
    _known_keys(values, Config, "")
    try:
        return pydantic.TypeAdapter(Config).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explained(problem) for problem in error.errors())) from None


def _with_origin(network: Any) -> Any:
    """A section of a network with `from`, which is no name of an attribute, under the name that it has inside."""
    if not isinstance(network, dict):
        return {} if network is None else network
    return {"origin" if key == "from" else key: value for key, value in network.items()}


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML file with its `extends` merged underneath: mappings merge, lists and scalars are replaced.

    Raises:
      ConfigError: for a missing file, broken YAML, or files that extend each other in a circle.
    """
    return _read_tree(path, ())


def _read_tree(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in below:
        raise ConfigError(
            f"config {path} extends itself through {' -> '.join(p.name for p in below)}; break the circle"
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a YAML file"
        raise ConfigError(f"config {path} does not exist{hint}") from None
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} holds {type(tree).__name__}, not a mapping of sections")
    if base := tree.pop("extends", None):
        tree = _merged(_read_tree(path.parent / base, (*below, path)), tree)
    return tree


def _merged(under: Mapping, over: Mapping) -> dict:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _copied(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _assign(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not an assignment; write section.key=value")
    *sections, last = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override {override!r} goes through {section!r}, which is not a section; replace it whole"
            )
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r} has a value that is not valid YAML: {error}") from None


def _known_keys(tree: Any, kind: Any, prefix: str) -> None:
    """Refuse unknown keys with the nearest known one, and name missing ones, before types are looked at."""
    if not isinstance(tree, dict):
        raise ConfigError(f"config section {prefix.rstrip('.') or 'the file'} is {tree!r}; it must be a mapping")
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"config key {prefix}{key} (value {value!r}) does not exist; {hint}")
        kinds = () if get_origin(hints[key]) is dict else (hints[key], *get_args(hints[key]))
        section = next((t for t in kinds if is_dataclass(t)), None)
        if prefix == "" and key == "model" and isinstance(value, dict):
            section = _MODEL_KINDS[_model_kind(value)]
        if section is not None and value is not None:
            _known_keys(value, section, f"{prefix}{key}.")
        if prefix == "" and key == "networks" and isinstance(value, dict):
            for name, network in value.items():
                _known_keys(network or {}, NetworkConfig, f"networks.{name}.")


def _refuse_shape(tree: Mapping[str, Any]) -> None:
    """Say why a field that describes the shape of a model cannot stand beside a checkpoint."""
    shape = {f.name for f in fields(TransformerConfig)} - {f.name for f in fields(PretrainedConfig)}
    if given := sorted(shape & tree.keys()):
        raise ConfigError(
            f"config key model.{given[0]} is {tree[given[0]]!r}, but model.path is {tree['path']!r}, whose config.json "
            f"says it; leave out {', '.join('model.' + name for name in given)}"
        )


def _explained(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part not in _MODEL_KINDS)
    if problem["type"] == "missing":
        return f"config key {where} is missing; add it"
    if problem["type"] == "value_error":
        return f"config: {problem['msg'].removeprefix('Value error, ')}"
    return f"config key {where} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def as_tree(config: Config) -> dict[str, Any]:
    """Plain dictionaries and lists, ready for YAML or JSON; `parse_config` reads them back to an equal config."""
    return _copied(asdict(config))


def numeric_tree(config: Any) -> dict[str, Any]:
    """The part of a config that decides the numbers: what the config hash of a checkpoint covers. Fields say so."""
    tree = _deciding(config)
    # More steps may be added to a run, unless a schedule depends on their number.
    if config.training.schedule == "constant":
        del tree["training"]["steps"]
    return tree


def _deciding(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in fields(value) if f.metadata.get("decides_numbers", True)]
        return {f.name: _deciding(getattr(value, f.name)) for f in kept}
    if isinstance(value, Mapping):
        return {str(key): _deciding(one) for key, one in value.items()}
    return [_deciding(one) for one in value] if isinstance(value, list | tuple) else value


def stage_trees(config: Config) -> list[dict[str, Any]]:
    """The stages of a run as whole configs in plain dictionaries: what each changes is merged over the rest."""
    tree = as_tree(config)
    stages = tree.pop("stages")
    return [
        _merged(tree | {"name": f"{config.name}"}, {k: v for k, v in stage.items() if k != "name"}) for stage in stages
    ]
