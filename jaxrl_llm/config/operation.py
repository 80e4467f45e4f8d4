"""Sections of how a run is operated: evaluation, checkpoints, reports, devices, and what a recipe is of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrl_llm.config.errors import at_least
from jaxrl_llm.parallel.rules import AXES, changed_rules


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy and sampled accuracy on the test split, before and after training.

    Attributes:
      problems: test problems used, and validation problems in probes; at most as many as there are.
      samples_per_problem: sampled completions for each problem; pass@k needs k of them.
      k: the k of pass@k and maj@k.
      temperature: of the sampled completions.
      sequences_per_batch: completions decoded together.
      grader: what judges completions: number, text, math, choice, code, or module:function of your own, see
        `jaxrl_llm.evaluation.function_grader`; None takes the task's verifier, or data.verifier for a file.
      every_steps: evaluate on the validation split every so many steps; 0 only before and after.
    """

    problems: int = 512
    samples_per_problem: int = 8
    k: tuple[int, ...] = (1, 8)
    temperature: float = 1.0
    sequences_per_batch: int = 1152
    every_steps: int = 0
    grader: str | None = None

    def __post_init__(self):
        at_least("evaluation", self, 1, "problems", "samples_per_problem", "sequences_per_batch")
        at_least("evaluation", self, 0, "every_steps")
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
        at_least("checkpoints", self, 1, "every_steps", "keep")


@dataclass(frozen=True)
class ReportingConfig:
    """What is written besides metrics.

    Attributes:
      samples_every_steps: write completions with their rewards every so many steps; 0 never.
      samples_per_report: completions written each time.
      loggers: where numbers go beside metrics.jsonl: tensorboard, csv, wandb, trackio or mlflow, each with options of
        its own, or `python: module:function`; see `jaxrl_llm.reporting.loggers`.
      samples_shown: completions shown in the terminal each time that samples are written.
      report: report.html, refreshed during the run and written at its end; None where the extra `report` is installed.
    """

    samples_every_steps: int = 10
    samples_per_report: int = 8
    report: bool | None = None
    loggers: tuple[Any, ...] = ("tensorboard",)
    samples_shown: int = 0

    def __post_init__(self):
        at_least("reporting", self, 0, "samples_every_steps", "samples_shown")
        at_least("reporting", self, 1, "samples_per_report")


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
        at_least("mesh", self, 1, "data", "fsdp", "tensor", "sequence", "expert", "slices")
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
