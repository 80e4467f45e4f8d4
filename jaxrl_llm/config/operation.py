"""Sections of how a run is operated: evaluation, checkpoints, reports, devices, and what a recipe is of."""

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
      problems: test problems used, and validation problems in probes; at most as many as there are.
      samples_per_problem: sampled completions for each problem; pass@k needs k of them.
      k: the k of pass@k and maj@k.
      temperature: of the sampled completions.
      sequences_per_batch: completions decoded together; null takes as many as fit a device, at most 1152.
      grader: what judges completions: number, text, math, choice, code, or module:function of your own, see
        `jaxrl_llm.evaluation.function_grader`; None takes the task's verifier, or data.verifier for a file.
      every_steps: evaluate on the validation split every so many steps; 0 only before and after.
      across_stages: after each stage, measure pass@1 on the validation problems of all stages; summary.json has the
        matrix, and what was forgotten.
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
    """How often the whole state is written, and which are kept.

    Attributes:
      every_steps: steps between two checkpoints.
      keep: the newest that are kept.
      keep_every_steps: checkpoints of multiples of this are kept for ever; null none.
      keep_best: the best that are kept beside them, by `best_metric`.
      best_metric: of the newest evaluation on the validation split (see evaluation.every_steps).
      best_is: "highest" or "lowest".
      local_dir: a directory on a disk, or in the memory (/dev/shm/...), of each host, where each process keeps the
        parts of the state that its devices hold, for a restart on the same hosts; null for none.
      local_every_steps: steps between two of those.
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
                f"{self.every_steps}; local checkpoints are those between the others, so choose fewer"
            )


@dataclass(frozen=True)
class FaultsConfig:
    """What a run puts up with.

    Attributes:
      most_failed_share: of the rows of a step for which a function of the user's own may fail, each counted and
        given its `value_on_failure`; beyond it the run ends with its state saved.
      most_skipped_updates: one after the other, for numbers that are not finite; beyond it the run ends.
      stalled_after_medians: a step that takes so many times the median of the last steps, and 10 minutes at least, ends
        the run with exit status 75, which says that it may be started again; 0 waits for ever.
    """

    most_failed_share: Share = 0.5
    most_skipped_updates: Natural = 5
    stalled_after_medians: NonNegative = 50.0

    def __post_init__(self):
        require_ranges(self, "faults")


@dataclass(frozen=True)
class ReportingConfig:
    """What is written besides metrics.

    Attributes:
      samples_every_steps: write completions with their rewards every so many steps, and at the first and the last step
        of a stage; 0 never.
      samples_per_report: completions written each time.
      loggers: where numbers go beside metrics.jsonl: tensorboard, csv, wandb, trackio or mlflow, each with options of
        its own, or `python: module:function`; see `jaxrl_llm.reporting.loggers`.
      samples_shown: completions shown in the terminal each time that samples are written.
      report: report.html, refreshed during the run and written at its end; None where the extra `report` is installed.
      diagnostics: each step also measures how its rewards go with each other, with the length and with the KL
        divergence, and how many completions are duplicates, empty, repetitive or in a foreign script.
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
        """Sizes by mesh axis, of those that are named."""
        named = {axis: getattr(self, "slices" if axis == "slice" else axis) for axis in AXES}
        return {axis: size for axis, size in named.items() if size is not None}


Direction = Literal["rises", "falls", "holds"]  # of a metric while a recipe trains; "holds": it does not fall away


@dataclass(frozen=True)
class AboutConfig:
    """Where a recipe comes from; shown by `jaxrl methods`."""

    paper: str = ""
    arxiv: str = ""
    stage: str = ""
    certainty: Literal["verified", "recalled", "reconstructed", ""] = ""
