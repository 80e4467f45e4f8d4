"""Sections on the method of a run: completions, the update, networks and adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrl_llm.config.errors import FREE, PLACEMENT
from jaxrl_llm.models.adapters import Bits, LoraConfig
from jaxrl_llm.models.transformer_config import Precision, Rematerialisation
from jaxrl_llm.parallel.rules import changed_rules
from jaxrl_llm.ranges import Count, Natural, NonNegative, Positive, PositiveShare, Share, ShareBelowOne, require_ranges
from jaxrl_llm.rollout.controls import Controls


@dataclass(frozen=True)
class EngineConfig:
    """An OpenAI-compatible engine that samples the completions of training; docs/engines.md explains how to launch one.

    Attributes:
      url: root of the engine, such as http://localhost:8000.
      model: name of the policy on the server.
      timeout_s: deadline of one request in seconds.
      concurrency: number of simultaneous requests.
      retries: further attempts after a failed connection or a temporary HTTP error.
      api_key_variable: environment variable that holds the key.
      request: further fields of every request.
      probe_prompts: number of prompts of the first batch on which the engine's log-probabilities are checked.
      probe_bound: highest mean difference from ours, in nats.
      probe_largest_bound: highest difference of a single token.
      weights_directory: directory of the exported policy, under a path that the engine can read too.
      reload_path: URL path that makes the engine load the exported policy.
      reload_body: JSON body of that request; {directory} is replaced by the exported directory.
      reload_then: URL paths that are called afterwards, with an empty body.
      reload_every_steps: steps between two exports; with 0 the engine keeps its initial weights.
    """

    url: str = field(metadata=FREE)
    model: str = field(metadata=FREE)
    timeout_s: Positive = field(default=600.0, metadata=FREE)
    concurrency: Count = field(default=64, metadata=FREE)
    retries: Natural = field(default=3, metadata=FREE)
    api_key_variable: str | None = field(default=None, metadata=FREE)
    request: dict[str, Any] = field(default_factory=dict)
    probe_prompts: Count = field(default=8, metadata=FREE)
    probe_bound: NonNegative = field(default=0.05, metadata=FREE)
    probe_largest_bound: NonNegative = field(default=1.0, metadata=FREE)
    weights_directory: str | None = field(default=None, metadata=FREE)
    reload_path: str | None = field(default=None, metadata=FREE)
    reload_body: dict[str, Any] = field(default_factory=lambda: {"model_path": "{directory}"}, metadata=FREE)
    reload_then: tuple[str, ...] = field(default=(), metadata=FREE)
    reload_every_steps: Natural = 1

    def __post_init__(self):
        require_ranges(self, "rollout.engine")
        for name in ("weights_directory", "reload_path"):
            if self.reload_every_steps and getattr(self, name) is None:
                raise ValueError(
                    f"rollout.engine.{name} is missing, so the engine would keep sampling from its initial "
                    "weights; set it, or set rollout.engine.reload_every_steps to 0 if this is intended"
                )
            if not self.reload_every_steps and getattr(self, name) is not None:
                raise ValueError(
                    f"rollout.engine.{name} is {getattr(self, name)!r}, but rollout.engine.reload_every_steps is 0, "
                    "so no weights are exported; leave one of them out"
                )


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled.

    Attributes:
      samples_per_prompt: completions for each prompt of a step.
      max_prompt_tokens: prompts are padded to this length; a longer prompt is an error (or dropped, see data).
      prompt_buckets: smaller widths; a step uses the smallest one that holds all of its prompts. True: powers of two.
        Each width that occurs needs its own program; `jaxrl explain` lists them.
      max_completion_tokens: longest completion, end of sequence included.
      temperature: of the softmax, both in sampling and in training.
      plan: how completions are sampled, from the innermost plan outwards: names of `jaxrl_llm.rollout.plans` with their
        hyper-parameters, such as {refill: {max_rounds: 10}}; empty: all at once.
      replay_router: in training, a mixture of experts routes each token to the experts that sampled it.
      engine: external engine that samples; None uses the built-in sampler.
      slots: number of completions decoded at a time, a finished one being replaced by the next; None decodes all
        completions of a step at once.
      top_k, top_p, min_p: truncated sampling in training; it needs top_k and `renormalised`.
      renormalised: sampler and trainer both normalise over the kept tokens. Without it truncated sampling is refused,
        because the sampled and the trained distribution would differ.
      off_policy_steps: 1 samples the next batch with the policy at the start of this step, in parallel with the update;
        0 samples it after the update.
    """

    samples_per_prompt: Count = 8
    max_prompt_tokens: Count = 32
    prompt_buckets: bool | tuple[int, ...] = False
    max_completion_tokens: Count = 64
    temperature: Positive = 1.0
    plan: tuple[Any, ...] = ()
    replay_router: bool = False
    engine: EngineConfig | None = None
    slots: Count | None = field(default=None, metadata=PLACEMENT)
    top_k: Count | None = None
    top_p: PositiveShare = 1.0
    min_p: Share = 0.0
    renormalised: bool = False
    off_policy_steps: Literal[0, 1] = 0

    def __post_init__(self):
        require_ranges(self, "rollout")
        if self.truncation is not None and not self.renormalised:
            raise ValueError(
                "rollout.top_k, top_p or min_p is set, but sampler and trainer must have the same support; set "
                "rollout.renormalised to true to train the truncated distribution, or leave them out"
            )
        if self.renormalised and self.truncation is None:
            raise ValueError(
                "rollout.renormalised is true, but sampling is not truncated; set rollout.top_k or leave it out"
            )
        widths = () if isinstance(self.prompt_buckets, bool) else self.prompt_buckets
        if unfit := [width for width in widths if not 1 <= width <= self.max_prompt_tokens]:
            raise ValueError(
                f"rollout.prompt_buckets holds {unfit[0]}, but widths of prompts must lie between 1 and "
                f"rollout.max_prompt_tokens {self.max_prompt_tokens}; remove it, or raise the limit"
            )
        if self.prompt_buckets and self.off_policy_steps:
            raise ValueError(
                "rollout.off_policy_steps keeps a batch that waits in the state, whose prompts have one width "
                "(one_width); leave rollout.prompt_buckets or rollout.off_policy_steps out"
            )

    @property
    def truncation(self) -> Controls | None:
        """The truncation of the sampling distribution; None without."""
        controls = Controls(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return controls if controls.truncates else None


@dataclass(frozen=True)
class StopWhenConfig:
    """Early stopping: ends a stage when a metric has not improved for some time.

    The metric is checked whenever a step writes it, evaluations on the validation split included; one more step runs
    after the deciding one.

    Attributes:
      metric: a name of metrics.jsonl, such as reward, or validation/pass@1 (see evaluation.every_steps).
      best_is: "highest" or "lowest".
      patience: number of consecutive values without improvement.
      min_delta: smallest difference from the best so far that counts as an improvement.
    """

    metric: str
    best_is: Literal["highest", "lowest"] = "highest"
    patience: Count = 5
    min_delta: NonNegative = 0.0

    def __post_init__(self):
        require_ranges(self, "training.stop_when")


@dataclass(frozen=True)
class TrainingConfig:
    """Reinforcement: number of steps, division of a batch, the optimiser, and memory savings.

    Attributes:
      steps: reinforcement steps; each samples one batch.
      prompts_per_step: groups in a batch.
      epochs_per_batch: passes over a batch.
      minibatches_per_epoch: optimiser updates per pass.
      sequences_per_microbatch: completions per backward pass; None: a whole minibatch.
      packing: in scoring and in the update rows are packed into bins as wide as one row, to reduce padding. The values
        are numbers of bins as shares of the number of rows; a batch uses the smallest that holds it. True: 1/4, 3/8,
        1/2 and 3/4. Losses and gradients are equal to those of unpacked rows.
      completion_buckets: widths to which completions are trimmed in scoring and in the update; a batch (or microbatch)
        uses the smallest that holds its longest completion. True: powers of two. Each width, like each share of
        `packing`, is compiled as a branch of the update.
      learning_rate: peak value.
      warmup_steps: linear rise, in optimiser updates.
      schedule: after the rise: constant, cosine to a tenth of the peak, or a function of `step` that returns a share of
        the peak, from `jaxrl_llm.schedules` or the user's own, with its hyper-parameters.
      optimizer: adamw, adafactor, muon (AdamW for parameters that are not matrices), lion or sgd; or any optimiser of
        optax, or the user's function, which is called with the learning rate, with its hyper-parameters: {adamw: {eps:
        1.0e-6}}.
      weight_decay: of every optimiser.
      adam_b1, adam_b2: of adamw and lion, when given by name only; muon uses adam_b2 for its momentum.
      moment_dtype: dtype of first moments; None is that of the parameters.
      bfloat16_update: how updates are added to bfloat16 parameters: rounded to the nearest number ("nearest"), with a
        float32 copy ("master"), or with stochastic rounding ("stochastic").
      remat: which part of a block's forward pass is recomputed in the backward pass: none, full (all of it), dots (all
        but matrix products), attention (all but the outputs of attention), offload_dots (as dots, with the products in
        host memory).
      offload: arrays in host memory between uses: optimizer, reference.
      max_gradient_norm: gradients of a larger global norm are scaled to it; null: no clipping.
      stop_when: ends the stage before `steps`, see `StopWhenConfig`; null runs all of them.
      freeze_policy_steps: number of first steps in which only other networks learn.
      alignment_every_steps: steps between two measurements of `alignment`, which needs three more gradients; 0: never.
    """

    steps: Natural = 100
    prompts_per_step: Count = 32
    epochs_per_batch: Count = 1
    minibatches_per_epoch: Count = 1
    sequences_per_microbatch: Count | None = field(default=None, metadata=PLACEMENT)
    packing: bool | tuple[PositiveShare, ...] = field(default=False, metadata=PLACEMENT)
    completion_buckets: bool | tuple[Count, ...] = field(default=False, metadata=PLACEMENT)
    learning_rate: NonNegative = 1e-4
    warmup_steps: Natural = 0
    schedule: str | dict[str, Any] = "constant"
    optimizer: str | dict[str, Any] = "adamw"
    weight_decay: NonNegative = 0.0
    adam_b1: ShareBelowOne = 0.9
    adam_b2: ShareBelowOne = 0.95
    moment_dtype: Precision | None = None
    bfloat16_update: Literal["nearest", "master", "stochastic"] = "nearest"
    remat: Rematerialisation = field(default="none", metadata=PLACEMENT)
    offload: tuple[Literal["optimizer", "reference"], ...] = field(default=(), metadata=PLACEMENT)
    max_gradient_norm: Positive | None = 1.0
    stop_when: StopWhenConfig | None = None
    freeze_policy_steps: Natural = 0
    alignment_every_steps: Natural = 0

    def __post_init__(self):
        require_ranges(self, "training")
        if self.optimizer == "adafactor" and self.moment_dtype is not None:
            raise ValueError(
                f"training.moment_dtype is {self.moment_dtype!r}, but adafactor keeps no first moments; leave it out"
            )


@dataclass(frozen=True)
class NetworkConfig:
    """A network beside the policy. It is created if a function has a parameter for its outputs; this section says how.

    By default a reference is a copy of the policy, and networks with a head (value, twin, token_reward) start as a copy
    and learn.

    Attributes:
      origin: `from` in a config: "policy" copies the initial policy of a stage; or the name of another network.
      path: a checkpoint: a run, or a Hugging Face directory; replaces `origin`.
      of: name of the network in a run; None uses the same name.
      head: the network returns numbers instead of log-probabilities: "scalar", or {outputs, layers, width,
          initial_scale}.
      says: which values of a head are used: one per "token", or the one at the "first" trained token of a row.
      backbone: of a head: "own" starts as a copy of the policy; "shared" reads the policy's hidden states, so the
        policy also gets the gradient of its loss.
      learns: whether it has an optimiser; None: only a head created from the policy has one.
      learning_rate: a constant.
      optimizer: as training.optimizer.
      max_gradient_norm: gradients of a larger global norm are scaled to it; null: no clipping.
      decay: the network is a moving average of its origin that keeps this share at each step.
      copy_every: steps between copies of its origin; 0: never.
      copy_at: further steps after which its origin is copied.
      temperature: of its log-probabilities; None: that of the rollout.
      always_origin: the network always equals its origin, for use at another temperature.
      parameter_dtype, compute_dtype: of a network read from a Hugging Face directory.
      int8: store the matrices of a network read from a path in int8, a quarter of float32's memory.
      rules: sharding of a network read from a path: changes to the table, as in mesh.rules.
    """

    origin: str = "policy"
    path: str | None = None
    of: str | None = None
    head: Literal["scalar"] | dict[str, Any] | None = None
    says: Literal["token", "first"] = "token"
    backbone: Literal["own", "shared"] = "own"
    learns: bool | None = None
    learning_rate: NonNegative = 1e-3
    optimizer: str | dict[str, Any] = "adamw"
    max_gradient_norm: Positive | None = 1.0
    decay: Share | None = None
    copy_every: Natural = 0
    copy_at: tuple[Count, ...] = ()
    temperature: Positive | None = None
    always_origin: bool = False
    parameter_dtype: Precision = "float32"
    compute_dtype: Precision = "float32"
    int8: bool = False
    rules: dict[str, tuple[str, ...]] = field(default_factory=dict, metadata=PLACEMENT)

    def __post_init__(self):
        require_ranges(self, "networks.*")
        if self.rules and self.path is None:
            raise ValueError(
                "networks.*.rules is set, but a network made from another one has the sharding of that network; set "
                "its path, or leave rules out"
            )
        try:
            changed_rules(self.rules)
        except ValueError as error:
            raise ValueError(str(error).replace("mesh.rules", "networks.*.rules")) from None
        if self.int8 and (self.path is None or self.head is not None or self.learns):
            raise ValueError(
                "networks.*.int8 is true, but only a network that is read from a path, has no head and does not learn "
                "can be stored in int8; set its path, or leave int8 out"
            )


@dataclass(frozen=True)
class AdapterConfig(LoraConfig):
    """Low-rank adapters (LoRA), the only trained parameters of the policy; other attributes as in `LoraConfig`.

    Attributes:
      int8: store the frozen matrices in int8.
      int4: store the frozen matrices in four bits, with a scale for every 64 inputs.
    """

    int8: bool = False
    int4: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.int8 and self.int4:
            raise ValueError("lora.int8 and lora.int4 are both true; choose one")

    @property
    def bits(self) -> Bits:
        """Bits of the frozen matrices; 0: not quantised."""
        return 8 if self.int8 else 4 if self.int4 else 0
