"""Remarks of a run in the terminal: before its steps, and about the metrics of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxrl_llm.config import Config
from jaxrl_llm.reporting.metric_alarms import Alarms
from jaxrl_llm.run import early_stopping
from jaxrl_llm.run.host_processes import ENVIRONMENT_LOG, LOGS
from jaxrl_llm.run.optimizers import long_warmup
from jaxrl_llm.run.staged import WARM_START
from jaxrl_llm.run.step_names import step_name

FAILURES = "failures/"  # beginning of the metrics that count failed calls of readings
FAILED_TURNS = "episode/failures_per_episode"  # of environments in Python


def left_out_warm_start(config: Config) -> str:
    """A note for a run that starts from another one without its own warm start; "" otherwise."""
    if config.init_from is None or not config.warm_start.steps or config.warm_start_steps:
        return ""
    return (
        f"no warm start: the policy of {config.init_from.path} takes its place "
        "(init_from: {path: ..., warm_start: true} runs it)"
    )


def before_the_steps(config: Config, stages: Sequence[Any], meta: Mapping[str, Any]) -> list[str]:
    """Notes on the stages that still run: a warm start that is left out, learning rates that never reach their peak.

    Args:
      config: of the run.
      stages: all its stages (`stages.Stage`).
      meta: of the checkpoint that it resumes from, or of the new run.
    """
    notes, begin = [left_out_warm_start(config)], [stage.name for stage in stages].index(meta["stage"])
    over = meta.get("stage_step", 0) >= stages[begin].steps
    for stage in stages[begin + over :]:
        section = "warm_start" if stage.name == WARM_START else "training"
        if warning := long_warmup(stage.parts.config.training, section):
            notes.append(f"{stage.name}: {warning}")
    return [note for note in notes if note]


@dataclass
class Remarks:
    """What was already said about the steps of one stage.

    Attributes:
      alarms: on its metrics.
      failed: for each reading, the failures of the step of the last remark on them.
    """

    alarms: Alarms = field(default_factory=Alarms)
    failed: dict[str, float] = field(default_factory=dict)

    def on(self, run: Any, stage: Any, done: int, shown: Mapping[str, float], rows: int | None) -> list[str]:
        """Remarks on the metrics of a step: alarms, failures, and the reason if they end the stage early.

        Failures are added to the totals in the metadata of checkpoints.

        Args:
          run, stage: `stages.Run` and `stages.Stage`.
          done: step of the stage.
          shown: its metrics.
          rows: completions of the step; None if unknown.
        """
        where = step_name(done, stage.name, run.meta["steps_before"])
        said = [f"alarm at {where}: {text}" for text in self.alarms.new(shown)]
        said += [f"{where}: {text}" for text in self.failures(run, shown, rows)]
        ends = early_stopping.note(run.meta, stage.name, stage.parts.config.training.stop_when, done, shown)
        return said + [ends] * bool(ends)

    def failures(self, run: Any, shown: Mapping[str, float], rows: int | None) -> list[str]:
        """Remarks on failures of readings and environments: the first, and those of a step with twice as many as the
        last remark.
        """
        totals, said = run.meta.setdefault("failures", {}), []
        turns = shown.get(FAILED_TURNS, 0.0)
        if turns and turns >= 2 * self.failed.get(FAILED_TURNS, 0):
            self.failed[FAILED_TURNS] = turns
            log = run.config.directory / LOGS / ENVIRONMENT_LOG
            why = f"; tracebacks are in {log}" if log.is_file() else ""
            said.append(f"the environment failed in {turns:.2g} turns per episode ({FAILED_TURNS}){why}")
        for metric, count in shown.items():
            if not metric.startswith(FAILURES):
                continue
            name = metric.removeprefix(FAILURES)
            totals[name] = totals.get(name, 0) + int(count)
            if count == 0 or count < 2 * self.failed.get(name, 0):
                continue
            self.failed[name] = count
            of = f"{count:.0f} rows" if rows is None or count > rows else f"{count:.0f} of {rows} completions"
            log = run.config.directory / LOGS / f"{name}.log"
            why = f", their tracebacks are in {log}" if log.is_file() else ""
            said.append(f"{name!r} failed for {of}, which got its value_on_failure ({metric} in metrics.jsonl){why}")
        return said
