"""Sections of how a run learns: completions, the update, networks and adapters."""

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
class StopWhenConfig:
    """Ends a stage before its last step: when a number has not become better for long enough.

    The number is read whenever a step writes it, evaluations on the validation split included, and the stage ends with
    the step after the one that decided it.

    Attributes:
      metric: a name of metrics.jsonl, such as reward, or validation/pass@1 (see evaluation.every_steps).
      best_is: "highest" or "lowest".
      patience: readings in a row that may pass without a better one.
      min_delta: by how much a better one must differ from the best so far.
    """

    metric: str
    best_is: Literal["highest", "lowest"] = "highest"
    patience: Count = 5
    min_delta: NonNegative = 0.0

    def __post_init__(self):
        require_ranges(self, "training.stop_when")


@dataclass(frozen=True)
class TrainingConfig:
    """Reinforcement: how many steps, how a batch is cut, the optimiser, and what saves memory.

    Attributes:
      steps: reinforcement steps; each samples one batch.
      prompts_per_step: groups in a batch.
      epochs_per_batch: passes over a batch.
      minibatches_per_epoch: optimiser updates a pass.
      sequences_per_microbatch: completions differentiated at once; None takes a whole minibatch.
      packing: rows share bins as wide as one row in scoring and in the update, so that little of it is padding: numbers
        of bins, as shares of the rows, of which a batch takes the smallest that holds it. True takes a quarter, three
        eighths, a half and three quarters. Losses and gradients are those of rows that are not packed.
      completion_buckets: widths that completions are trimmed to in scoring and in the update; a batch (or microbatch)
        takes the smallest that holds its longest. True takes powers of two. Each of them, as each share of `packing`,
        is compiled as a branch of the update.
      learning_rate: peak.
      warmup_steps: linear rise, in optimiser updates.
      schedule: after the rise: constant, cosine to a tenth of the peak, or a function of `step` that returns a share of
        it, from `jaxrl_llm.schedules` or the user's own, with its hyper-parameters.
      optimizer: adamw, adafactor, muon (AdamW for what is no matrix), lion or sgd; or any that optax has, or a function
        of the user's own, called with the learning rate, with its hyper-parameters: {adamw: {eps: 1.0e-6}}.
      weight_decay: of every optimiser.
      adam_b1, adam_b2: of adamw and lion by their names alone; muon takes adam_b2 for its momentum.
      moment_dtype: dtype of first moments; None is that of the parameters.
      bfloat16_update: how a step reaches parameters of bfloat16: rounded to the nearest number, by way of a float32
        copy ("master"), or rounded up or down at random ("stochastic").
      remat: what of a block's forward pass is computed again in the backward pass instead of kept: none, full (all of
        it), dots (all but matrix products), attention (all but what attention returns), offload_dots (as dots, and the
        products wait in the host's memory).
      offload: what is kept in the host's memory between its uses: optimizer, reference.
      max_gradient_norm: gradients of a larger global norm are scaled to it; null scales none.
      stop_when: ends the stage before `steps`, see `StopWhenConfig`; null runs all of them.
      freeze_policy_steps: first steps in which only other networks learn.
      alignment_every_steps: steps between two measurements of `alignment`, which takes three more gradients; 0 never
        measures it.
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
      learns: it has an optimiser; None says yes for a head that is made from the policy.
      learning_rate: constant.
      optimizer: as training.optimizer.
      max_gradient_norm: gradients of a larger global norm are scaled to it; null scales none.
      decay: it follows its origin as a moving average that keeps this share at each step.
      copy_every: steps between copies of its origin; 0 never.
      copy_at: steps after which its origin is copied, beside those.
      temperature: of its log-probabilities; None is that of the rollout.
      always_origin: it is its origin at every moment: the policy at another temperature.
      parameter_dtype, compute_dtype: of one that is read from a directory of Hugging Face.
      int8: the matrices of one that is read from a path are kept in int8: a quarter of float32's memory.
      rules: of one that is read from a path: changes to the table of where its arrays lie on the mesh, as mesh.rules.
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
                "networks.*.rules is set, but a network that is made from another one lies where that one does; name "
                "its path, or leave rules out"
            )
        try:
            changed_rules(self.rules)
        except ValueError as error:
            raise ValueError(str(error).replace("mesh.rules", "networks.*.rules")) from None
        if self.int8 and (self.path is None or self.head is not None or self.learns):
            raise ValueError(
                "networks.*.int8 is true, but only a network that is read from a path, has no head and does not learn "
                "can be kept in int8; name its path, or leave int8 out"
            )


@dataclass(frozen=True)
class AdapterConfig(LoraConfig):
    """Low-rank adapters (LoRA) are all that learns of the policy; rank, alpha, targets and rank_stabilised as there.

    Attributes:
      int8: the matrices under the adapters are stored in int8.
      int4: they are stored in four bits, with a scale for every 64 inputs.
    """

    int8: bool = False
    int4: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.int8 and self.int4:
            raise ValueError("lora.int8 and lora.int4 are both true; choose one")

    @property
    def bits(self) -> Bits:
        """Of the matrices under the adapters; 0 leaves them as they are."""
        return 8 if self.int8 else 4 if self.int4 else 0
