"""The training loop of every stage of a run: supervised steps, a reward model, reinforcement learning.

A stage runs from the step of its state to its last step, writes the metrics of every step, and saves its whole state
in checkpoints, from which it can be resumed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax
from rich.console import Console

from jaxrl_llm.config import Config
from jaxrl_llm.data import DataSet, ProblemSet
from jaxrl_llm.endpoints import EndpointError
from jaxrl_llm.experience import Experience, NetworkState, TrainState
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting import Progress, RunDirectory
from jaxrl_llm.reporting.machine_report import memory_in_use
from jaxrl_llm.reporting.mirror import Mirror
from jaxrl_llm.reporting.progress import COLUMNS
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.run import checkpoints, early_stopping
from jaxrl_llm.run.compilation import CompilationWatch
from jaxrl_llm.run.frozen import Frozen, frozen_networks, written_once
from jaxrl_llm.run.goodput import SET_UP, Lifetime
from jaxrl_llm.run.interruption import Abandoned, Interruption
from jaxrl_llm.run.live_report import LiveReport
from jaxrl_llm.run.local_checkpoints import LocalCheckpoints
from jaxrl_llm.run.nonfinite import TrainingError, looked_at
from jaxrl_llm.run.optimizers import learning_rates
from jaxrl_llm.run.prompt_choices import StageData, batch_of, choices_of, next_choices
from jaxrl_llm.run.remarks import Remarks
from jaxrl_llm.run.samples import spread, write_samples
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.run.step_names import step_name
from jaxrl_llm.run.step_trace import StepTrace


class Stopped(Exception):
    """Raised when a signal has stopped the run, after its state was saved.

    Attributes:
      status: exit status, 128 plus the number of the signal, as in shells.
    """

    def __init__(self, text: str, number: int = signal.SIGTERM):
        super().__init__(text)
        self.status = 128 + number


@dataclass(frozen=True)
class Stage:
    """One stage of a run, before its data is made.

    Attributes:
      name: name in metrics, checkpoints and messages.
      parts: the objects that its config describes.
      steps: largest number of steps.
      probe_every_steps: number of steps between evaluations on the validation split; 0: no evaluation.
      probes: names of the metrics of these evaluations that are written; None: all.
      stop_at_accuracy: the stage ends at the first evaluation whose pass@1 is at least this value; None: never.
      first_saved: whether its first state is saved before its first step.
    """

    name: str
    parts: Parts
    steps: int
    probe_every_steps: int = 0
    probes: tuple[str, ...] | None = None
    stop_at_accuracy: float | None = None
    first_saved: bool = True

    @property
    def samples(self) -> bool:
        """Whether the policy is sampled in this stage."""
        return self.parts.step.composition.rollout is not None


@dataclass
class Run:
    """Objects that the stages of one run share. `run.train` makes one.

    Attributes:
      config: config of the run.
      parts: parts of the current stage.
      directory: open files of the run.
      manager: manager of its checkpoints.
      console: console for messages.
      meta: data in a checkpoint beside the state: stage, counts, the evaluation before training, seconds.
      watch: counter of compilations.
      data: problems by split, for evaluations.
      sets: the data of each stage by split.
      interruption: signals and the watchdog.
      waiting_networks: networks that an earlier stage has trained and a later stage reads, but not the current one.
      skipped_in_a_row: number of consecutive skipped updates up to this step; if it is not 0, the state is not saved.
      stopping: whether the run ends after this step; the same on all processes.
      trace: profile of some steps; None: no profile.
      report: the HTML report, which is updated when a checkpoint is saved.
      mirror: copies the run to its remote address; None: the run is local.
      frozen: networks that are written only once, by stage and name.
      local: checkpoints on this host's disk, between those on the shared storage; None: there are none.
      lifetime: record of the time since this start; None: it is not recorded.
      compiled: seconds of compilation that are already accounted for.
      mark, charged_to: time of the last call of `charge`; entry of meta["seconds"] for the time since then.
    """

    config: Config
    parts: Parts
    directory: RunDirectory
    manager: Any
    console: Console
    meta: dict[str, Any]
    watch: CompilationWatch
    data: dict[str, DataSet | ProblemSet] = field(default_factory=dict)
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting_networks: dict[str, NetworkState] = field(default_factory=dict)
    report: LiveReport | None = None
    trace: StepTrace | None = None
    mirror: Mirror | None = None
    frozen: dict[tuple[str, str], Frozen] = field(default_factory=dict)
    local: LocalCheckpoints | None = None
    lifetime: Lifetime | None = None
    interruption: Interruption = field(kw_only=True)
    stopping: bool = False
    skipped_in_a_row: int = 0
    mark: float = 0.0
    charged_to: str = SET_UP
    compiled: float = 0.0

    @property
    def apart(self) -> bool:
        """Whether each of several processes has its own disk with a run directory."""
        return self.mirror is not None and self.mirror.apart

    @contextmanager
    def timed(self, what: str):
        """Account the time of a block to `what` instead of the enclosing block."""
        self.charge()
        around, self.charged_to = self.charged_to, what
        self.interruption.busy(what)
        try:
            yield
        finally:
            self.charge()
            self.charged_to = around
            self.interruption.busy(around)

    def charge(self) -> None:
        """Add the time since the last call to the current entry of meta["seconds"]."""
        seconds, now = self.meta["seconds"], time.monotonic()
        seconds[self.charged_to] = seconds.get(self.charged_to, 0.0) + now - self.mark
        if self.charged_to != SET_UP:
            compiling = self.watch.seconds - self.compiled
            self.meta["compilation_seconds"] = self.meta.get("compilation_seconds", 0.0) + compiling
        self.mark, self.compiled = now, self.watch.seconds

    def _kept(self, stage: str, state: TrainState) -> TrainState:
        """The part of a state that a checkpoint stores; also updates meta, and flushes files of the run to the disk."""
        self.directory.sync()
        self.charge()
        self.meta |= {"stage": stage, "stage_step": int(state.step)}
        return replace(state, networks=checkpoints.written_networks(self.parts, state) | self.waiting_networks)

    def save_locally(self, global_step: int, stage: str, state: TrainState) -> None:
        """Write a checkpoint to this host's disk."""
        assert self.local is not None
        kept = checkpoints.learned_part(self._kept(stage, state), self.parts.model.trained)
        self.local.save(global_step, kept, self.meta)

    def save(self, global_step: int, stage: str, state: TrainState) -> None:
        """Write a checkpoint; `global_step` is counted over all stages."""
        kept = self._kept(stage, state)
        saved: dict[str, Any] = {"trained": self.parts.model.trained, "metric": self.meta.get("metric")}
        saved["apart"] = self.apart
        still = {*frozen_networks(self.parts.step.composition, kept.networks), *self.waiting_networks}
        saved["frozen"] = written_once(self.frozen, self.manager.directory, stage, kept, still, apart=self.apart)
        checkpoints.save(self.manager, global_step, kept, self.meta, **saved)
        if self.report is not None:
            self.report.refresh()
        if self.mirror is not None:
            self.mirror.push_later()

    def due(self, done: int, ends: bool) -> Callable[[int, str, TrainState], None] | None:
        """The function that saves the state after a step of a stage; None if it is not saved."""
        kept = self.config.checkpoints
        if done % kept.every_steps == 0 or self.stopping or ends:
            return self.save
        return self.save_locally if self.local is not None and done % kept.local_every_steps == 0 else None

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step, and the duration of this start so far."""
        self.directory.write_metrics(step, metrics)
        if self.lifetime is not None:
            self.lifetime.mark()

    def asked(self) -> dict[str, Any]:
        """Arguments of a step: the caller of the environment, and the check whether the run must stop."""
        return {"call": self.parts.call, "stop": self.interruption.give_up_the_step}

    def taken(self, stage: Stage) -> Callable[..., Any]:
        """The function that runs a step of a stage, with a profile of the requested steps."""
        run = stage.parts.step.run
        return run if self.trace is None else self.trace.traced(stage.parts, self.meta["steps_before"])

    def stopped(self, global_step: int) -> Stopped:
        """The exception that ends a run after a stop signal, when its state has been saved."""
        return Stopped(
            f"stopped at step {global_step}; go on with: jaxrl train --resume {self.config.place}",
            self.interruption.number or signal.SIGTERM,
        )

    def placed(self, rows: Any) -> Any:
        """The rows of a batch on the devices of the step; each process passes its own rows."""
        place = self.parts.step.composition.resources.placement
        return hosts.placed_rows(rows, place.mesh, place.rules)


def run_stage(
    run: Run, stage: Stage, state: TrainState, data: StageData, measure: Callable, *, last: bool
) -> TrainState:
    """Run the steps of a stage. Metrics are read one step late, so that the device never waits for the host.

    Args:
      run: objects of all stages.
      stage: the stage.
      state: the initial state, or the saved one.
      data: rows of the stage.
      measure: (params, split, number of problems, entry of meta["seconds"]) -> accuracies.
      last: whether this is the last stage; then its last state is saved.
    """
    offset, first, take = run.meta["steps_before"], int(state.step), run.taken(stage)
    counted = stage.parts.config.training.prompts_per_step * stage.parts.config.rollout.samples_per_prompt
    with _progress(run, stage, counted) as progress, run.timed(stage.name):
        rates, mark = learning_rates(stage.parts.config.training, stage.steps, state), time.monotonic()

        def report(done: int, metrics: dict[str, Any], rows: Experience, items: list, returned: float) -> None:
            nonlocal mark
            shown = looked_at(run, jax.device_get(metrics), done, offset, stage.name, rows)
            # Of a step with host parts, the next one has waited for the host when its metrics are read.
            ended = time.monotonic() if len(stage.parts.step.segments) == 1 else returned
            seconds, mark = ended - mark, ended
            shown |= {"learning_rate": float(rates[done - first - 1]), "seconds": seconds} | memory_in_use()
            if stage.samples and "completion_tokens" in shown:
                tokens = shown["completion_tokens"] * counted
                run.meta["tokens"] += round(tokens)
                shown["tokens_per_second"] = tokens / seconds
            run.write_metrics(offset + done, {"stage": stage.name} | shown)
            for text in remarks.on(run, stage, done, shown, counted if stage.samples else None):
                progress.message(text)
            if stage.samples:
                write_samples(run, offset + done, done, rows, items, first=done == first + 1, last=stage.steps)
            progress.update(done, shown)

        remarks, unread, choices = Remarks(), None, choices_of(state)
        widths: set[int] = set()
        for index in range(first, first if early_stopping.over(run.meta, stage.name, first) else stage.steps):
            done = index + 1
            prompts, items = _prompts(run, stage, data, index, choices)
            width = 0 if prompts is None else prompts.tokens.shape[1]
            new_width = width not in widths
            if new_width and widths:
                run.watch.allow()
                run.interruption.busy(named := step_name(done, stage.name, offset))
                progress.message(f"{named} is the first with prompts of {width} tokens: its program is compiled")
            widths.add(width)
            written = None if data.written is None else run.placed(data.written(index))
            try:
                new_state, metrics, rows = take(state, run.placed(prompts), items, written, **run.asked())
            except (RewardError, EndpointError, Abandoned) as error:
                if unread is not None:
                    report(*unread)
                _leave(run, error, offset + index, stage.name, state)
            choices = next_choices(choices, new_state)
            if unread is not None:
                report(*unread)
            state, unread, reached = new_state, (done, metrics, rows, items, time.monotonic()), False
            if stage.probe_every_steps and done % stage.probe_every_steps == 0 and (done < stage.steps or not last):
                run.watch.allow()  # a resumed run compiles its evaluation here
                metrics |= (probed := _probed(run, stage, state, measure))
                progress.validation(done, probed)
                if done > first + 2:
                    run.watch.expect_none(progress.message)
                reached = stage.stop_at_accuracy is not None and probed["validation/pass@1"] >= stage.stop_at_accuracy
            if done == first + 2 or (new_width and done > first + 2):
                run.watch.expect_none(progress.message)
            run.interruption.step_done(step_name(done + 1, stage.name, offset))
            run.stopping = hosts.agreed_stop(run.interruption.asked)
            ends = reached or done == stage.steps or early_stopping.over(run.meta, stage.name, done)
            if ends and not last:
                break
            if (save := run.due(done, ends)) is not None:
                report(*unread)
                unread = None
                run.watch.allow()  # on a mesh, orbax compiles the slicing of arrays, in a resumed run here
                if not run.skipped_in_a_row or ends or run.manager.latest_step() is None:
                    save(offset + done, stage.name, state)
                if done >= first + 2:
                    run.watch.expect_none(progress.message)
                if ends:
                    break
                if run.stopping:
                    run.manager.wait_until_finished()
                    raise run.stopped(run.manager.latest_step())
        if unread is not None:
            report(*unread)
        run.watch.allow()
    run.meta["steps_before"] = offset + int(state.step)
    return state


def _probed(run: Run, stage: Stage, state: TrainState, measure: Callable) -> dict[str, float]:
    """The metrics of an evaluation on the validation split that the stage writes."""
    held_out = measure(state.params, "validation", run.config.evaluation.problems, "evaluation during")
    names = held_out if stage.probes is None else stage.probes
    probed = {f"validation/{name}": held_out[name] for name in names if name in held_out}
    if stage.first_saved:  # checkpoints of a warm start are not candidates for the best one
        run.meta["metric"] = probed.get(run.config.checkpoints.best_metric)
    return probed


def _prompts(run: Run, stage: Stage, data: StageData, index: int, choices: list[Any]) -> tuple[Any, list]:
    """(prompts to sample, records of the trained rows); one step off-policy, the prompts are those of the next step."""
    if data.prompts is None:
        return None, []
    now = batch_of(data.prompts, index, choices, 0)
    ahead = bool(stage.parts.step.priming)
    return (batch_of(data.prompts, index, choices, 1) if ahead else now).prompts, now.items


def stage_data(stage: Stage, prompts: Any, written: Callable[[int], Experience] | None, stored: Any) -> StageData:
    """The rows of a stage by step; they depend only on the step, not on the order in which steps are requested.

    Args:
      stage: the stage.
      prompts: batches of prompts.
      written: written rows by step, see `written_of`.
      stored: answers that were stored before the stage, or None.
    """
    config, source = stage.parts.config, stage.parts.step.composition.written
    if stored is not None and source is not None:
        key, width = jax.random.key(config.seed), config.rollout.max_completion_tokens
        return StageData(prompts, lambda step: stored.batch(key, step, source.rows, answer_width=width))
    return StageData(prompts if stage.samples else None, written)


def written_of(parts: Parts, sets: Mapping[str, Any]) -> Callable[[int], Experience] | None:
    """Written rows that are passed to each step of these parts, by step; None if there are none."""
    feed = next((feed for feed in parts.feeds if feed.rows), None)
    return None if feed is None or feed.rows is None else feed.rows(parts, sets)


def _leave(run: Run, error: Exception, global_step: int, stage: str, state: TrainState) -> NoReturn:
    """Save the state before a failed step, and raise the error of the step; `failures.continued` says the way on."""
    if run.manager.latest_step() != global_step:  # it may already be saved
        run.save(global_step, stage, state)
    run.manager.wait_until_finished()
    if isinstance(error, Abandoned):
        raise run.stopped(global_step)
    raise error


def _progress(run: Run, stage: Stage, counted: int) -> Progress:
    """The progress display of a stage; the column `correct_share` is labelled with the condition for a right answer."""
    c = stage.parts.step.composition
    right = "solved" if stage.parts.environment is not None else f"{c.rewards[0].name} ≥ 1" if c.rewards else ""
    columns = tuple(c._replace(label=right) if c.name == "correct_share" else c for c in COLUMNS)
    sequences = counted if stage.samples else None
    return Progress(max(stage.steps, 1), stage.name, run.console, sequences_per_step=sequences, columns=columns)


__all__ = [
    "Run",
    "Stage",
    "StageData",
    "Stopped",
    "TrainingError",
    "run_stage",
    "spread",
    "stage_data",
    "written_of",
]
