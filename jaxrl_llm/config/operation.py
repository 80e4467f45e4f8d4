"""Sections on the operation of a run: evaluation, checkpoints, reports, devices, and the origin of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrl_llm.config.errors import PLACEMENT
from jaxrl_llm.parallel.rules import AXES, changed_rules
from jaxrl_llm.ranges import Count, Natural, NonNegative, Share, require_ranges


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy and sampled accuracy on the test split, before and after training.

    Attributes:
      problems: number of test problems, and of validation problems in probes; capped at the size of the split.
      samples_per_problem: sampled completions for each problem; pass@k needs k of them.
      k: the k of pass@k and maj@k.
      temperature: sampling temperature.
      sequences_per_batch: completions decoded together; null uses as many as fit on a device, at most 1152.
      grader: judges completions: number, text, math, choice, code, or your own module:function, see
        `jaxrl_llm.evaluation.function_grader`; None uses the task's verifier, or data.verifier for a file.
      every_steps: steps between evaluations on the validation split; 0 evaluates only before and after. The last step
        of the run is left out, since the evaluation of the test split follows it.
      across_stages: after each stage, measure pass@1 on the validation problems of all stages; summary.json has the
        matrix and the forgetting.
    """

    problems: Count = 512
    samples_per_problem: Count = 8
    k: tuple[Count, ...] = (1, 8)
    temperature: NonNegative = 1.0
    sequences_per_batch: Count | None = field(default=None, metadata=PLACEMENT)
    every_steps: Natural = 0
    across_stages: bool = False
    grader: str | None = None

    def __post_init__(self):
        require_ranges(self, "evaluation")
        if not self.k or max(self.k) > self.samples_per_problem:
            raise ValueError(
                f"evaluation.k is {list(self.k)}, but evaluation.samples_per_problem is {self.samples_per_problem}; "
                "every k must lie between 1 and the number of samples"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """How often checkpoints of the whole state are written, and which are kept.

    Attributes:
      every_steps: steps between two checkpoints.
      keep: number of newest checkpoints to keep.
      keep_every_steps: checkpoints at multiples of this are never deleted; null: none.
      keep_best: number of further checkpoints to keep, the best by `best_metric`.
      best_metric: a metric of the newest evaluation on the validation split (see evaluation.every_steps).
      best_is: "highest" or "lowest".
      local_dir: a directory on a local disk or in the memory (/dev/shm/...) of each host, where each process keeps the
        parts of the state on its devices, for a restart on the same hosts; null: none.
      local_every_steps: steps between two local checkpoints.
    """

    every_steps: Count = 20
    keep: Count = 2
    keep_every_steps: Count | None = None
    keep_best: Natural = 0
    best_metric: str = "validation/pass@1"
    best_is: Literal["highest", "lowest"] = "highest"
    local_dir: str | None = None
    local_every_steps: Count = 1

    def __post_init__(self):
        require_ranges(self, "checkpoints")
        if self.local_dir is not None and self.local_every_steps >= self.every_steps:
            raise ValueError(
                f"checkpoints.local_every_steps is {self.local_every_steps}, but checkpoints.every_steps is "
                f"{self.every_steps}; local checkpoints are written between the others, so choose a smaller number"
            )


@dataclass(frozen=True)
class FaultsConfig:
    """Limits on failures, beyond which a run ends.

    Attributes:
      most_failed_share: largest share of the rows of a step for which a user's function may fail; failed rows are
        counted and get the `value_on_failure`. Beyond it the run ends with its state saved.
      most_skipped_updates: largest number of consecutive updates skipped for non-finite numbers; beyond it the run
          ends.
      stalled_after_medians: a step that takes more than this multiple of the median of the last steps, and at least 10
        minutes, ends the run with exit status 75 (it may be restarted); 0 waits for ever.
    """

    most_failed_share: Share = 0.5
    most_skipped_updates: Natural = 5
    stalled_after_medians: NonNegative = 50.0

    def __post_init__(self):
        require_ranges(self, "faults")


@dataclass(frozen=True)
class ReportingConfig:
    """Outputs besides metrics.jsonl.

    Attributes:
      samples_every_steps: steps between two writes of completions with their rewards, also at the first and the last
        step of a stage; 0: never.
      samples_per_report: completions written each time.
      loggers: further outputs of metrics: tensorboard, csv, wandb, trackio or mlflow, each with its own options, or
        `python: module:function`; see `jaxrl_llm.reporting.loggers`.
      samples_shown: completions printed each time that samples are written.
      report: whether report.html is updated during the run and written at its end; None: if the extra `report` is
          installed.
      diagnostics: each step also measures correlations of its rewards with each other, the length and the KL
        divergence, and counts duplicate, empty and repetitive completions and those in a foreign script.
    """

    samples_every_steps: Natural = 10
    samples_per_report: Count = 8
    report: bool | None = None
    loggers: tuple[Any, ...] = ("tensorboard",)
    samples_shown: Natural = 0
    diagnostics: bool = True

    def __post_init__(self):
        require_ranges(self, "reporting")


@dataclass(frozen=True)
class MeshConfig:
    """The devices of a run as a mesh. Without sizes (or with `mesh: auto`) the sizes are chosen and printed.

    Attributes:
      devices: number of devices to use; None uses all.
      data: replicas of the parameters, among which the rows of a batch are split.
      fsdp: devices among which rows and parameters are split: each keeps a part of every matrix, which is gathered for
          use.
      tensor: devices among which each matrix product is split; divides model.kv_heads and the width of the MLP.
      sequence: devices among which the positions of each row are split.
      expert: devices among which the experts of a mixture are split; divides model.experts.count.
      slices: TPU slices, connected by a slow network; each holds replicas.
      rules: changes to the table that maps names of array axes to mesh axes, such as {mlp: [tensor, fsdp]}.
      gather_for_rollout: sampling gathers the parameters once per rollout, which needs memory for all parts that
        `tensor` and `expert` do not split; false gathers them for each token.
    """

    devices: Count | None = None
    data: Count | None = None
    fsdp: Count | None = None
    tensor: Count | None = None
    sequence: Count | None = None
    expert: Count | None = None
    slices: Count | None = None
    rules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gather_for_rollout: bool = True

    def __post_init__(self):
        require_ranges(self, "mesh")
        changed_rules(self.rules)

    @property
    def sizes(self) -> dict[str, int]:
        """The given sizes by mesh axis."""
        named = {axis: getattr(self, "slices" if axis == "slice" else axis) for axis in AXES}
        return {axis: size for axis, size in named.items() if size is not None}


Direction = Literal[
    "rises", "falls", "holds"
]  # of a metric during training with a recipe; "holds": it does not collapse


@dataclass(frozen=True)
class AboutConfig:
    """The publication of a recipe; shown by `jaxrl methods`."""

    paper: str = ""
    arxiv: str = ""
    stage: str = ""
    certainty: Literal["verified", "recalled", "reconstructed", ""] = ""
