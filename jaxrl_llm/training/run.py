"""A whole run on the host: warm start, evaluation, reinforcement, evaluation; checkpointed and resumable at any step.

Everything random is addressed by (seed, step), the data position is the step, and the whole state is in the
checkpoint, so a resumed run repeats the numbers of one that was never stopped.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from jaxrl_llm.config import Config, as_tree, numeric_tree
from jaxrl_llm.data import Batches, DataSet
from jaxrl_llm.evaluation import make_evaluate
from jaxrl_llm.experience import Experience, TrainState
from jaxrl_llm.reporting import Progress, RunDirectory, results_table, units_table
from jaxrl_llm.reporting.machine import package_versions
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.training import checkpoints
from jaxrl_llm.training.compilation import CompilationWatch
from jaxrl_llm.training.explain import trace
from jaxrl_llm.training.setup import Parts, demonstration_batches, parts, prompt_batches, task_data
from jaxrl_llm.training.supervised import demonstrations, make_supervised_step

WARM_START, REINFORCEMENT = "warm start", "reinforcement"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and where the last good checkpoint is."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class Run:
    """What the stages of one run share. Only `training.run` makes one.

    Attributes:
      parts: what the config describes.
      directory: open files of the run.
      manager: its checkpoints.
      console: where people read.
      meta: what a checkpoint records beside the state: stage, counts, the evaluation before training, seconds.
      watch: counts compilations.
      stopping: a signal arrived.
      mark, charged_to: since when, and to which part, time is being charged.
    """

    parts: Parts
    directory: RunDirectory
    manager: Any
    console: Console
    meta: dict[str, Any]
    watch: CompilationWatch
    data: dict[str, DataSet] = field(default_factory=dict)
    stopping: bool = False
    mark: float = 0.0
    charged_to: str = "set-up"

    @property
    def config(self) -> Config:
        return self.parts.config

    @contextmanager
    def timed(self, what: str):
        """Charge the seconds of a block to `what`, and not to the block around it."""
        self.charge()
        around, self.charged_to = self.charged_to, what
        try:
            yield
        finally:
            self.charge()
            self.charged_to = around

    def charge(self) -> None:
        """Add the time since the last call to the part that it belongs to."""
        seconds, now = self.meta["seconds"], time.monotonic()
        seconds[self.charged_to] = seconds.get(self.charged_to, 0.0) + now - self.mark
        self.mark = now

    def save(self, global_step: int, stage: str, state: TrainState) -> None:
        """Write a checkpoint whose step is counted over all stages."""
        self.directory.sync()
        self.charge()
        self.meta |= {"stage": stage, "stage_step": int(state.step)}
        checkpoints.save(self.manager, global_step, state, self.meta)


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a config from start to final table, or go on with a run that was stopped.

    Args:
      config: what to run; on resuming it must decide the same numbers as the config of the run.
      resume: go on from the newest checkpoint in `config.directory`.
      console: where progress is shown; None for standard output.

    Returns:
      The summary that is also written to summary.json.

    Raises:
      ValueError: for anything in the config or the run directory that cannot work; before compute is spent.
      CheckpointError: resuming with another config or other data.
      TrainingError: when a number stops being finite.
      RewardError: when a reward function fails; the state before the failed step is saved.
      Stopped: after SIGTERM or SIGINT; the state is saved.
    """
    console = console or Console()
    started = time.monotonic()
    built = parts(config)
    trace(built)
    numbers = checkpoints.config_hash(numeric_tree(config))
    meta: dict[str, Any] = {"config_hash": numbers, "seconds": {}, "tokens": 0, "warm_start_steps": 0}
    folder = config.directory / "checkpoints"
    newest = checkpoints.latest_step(folder) if resume else None
    if newest is not None:
        meta = checkpoints.read_meta(folder, newest)
        if meta["config_hash"] != numbers:
            raise checkpoints.CheckpointError(
                f"run {config.directory} was written with config hash {meta['config_hash']}, but this config has "
                f"{numbers}; resume with the run's own config.yaml, or start a new run with another run_dir"
            )
    console.print(units_table(_units(built)))
    data = {split: task_data(config, split) for split in ("train", "validation", "test")}
    fingerprint = {split: part.fingerprint for split, part in data.items()}
    if meta.setdefault("data", fingerprint) != fingerprint:
        raise checkpoints.CheckpointError(
            f"run {config.directory} was trained on data {meta['data']}, but the data is now {fingerprint}; restore "
            "the data, or start a new run"
        )
    prompts = prompt_batches(built, data["train"])
    with (
        RunDirectory(config.directory, as_tree(config), resume_step=(newest or 0) if resume else None) as directory,
        checkpoints.checkpoint_manager(folder, keep=config.checkpoints.keep) as manager,
        CompilationWatch() as watch,
    ):
        run = Run(built, directory, manager, console, meta, watch, data, mark=started)
        if prompts.dropped:
            console.print(f"dropped {prompts.dropped} prompts longer than {config.rollout.max_prompt_tokens} tokens")
        with _signals(run):
            return _stages(run, prompts, newest)


def _stages(run: Run, prompts: Batches, newest: int | None) -> dict[str, Any]:
    config, folder = run.config, run.config.directory / "checkpoints"
    key = jax.random.key(config.seed)
    evaluate = make_evaluate(
        run.parts.model,
        run.parts.task,
        run.parts.tokenizer,
        samples_per_problem=config.evaluation.samples_per_problem,
        k=config.evaluation.k,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        sequences_per_batch=config.evaluation.sequences_per_batch,
        temperature=config.evaluation.temperature,
    )

    def measure(params: Any, split: str, problems: int, what: str) -> dict[str, float]:
        with run.timed(what):
            data = run.data[split]
            items = [data[i] for i in spread(len(data), problems)]
            return evaluate(params, items, jax.random.fold_in(key, 2))

    step = run.parts.step
    if newest is None or run.meta["stage"] == WARM_START:
        params = _warm_start(run, key, newest, measure)
        run.meta["before"] = measure(params, "test", config.evaluation.problems, "evaluation before")
        state = step.init(key, params)
        run.save(run.meta["warm_start_steps"], REINFORCEMENT, state)
    else:
        state = checkpoints.restore(folder, newest, step.init(key))
    state = _reinforce(run, state, prompts, measure)
    after = measure(state.params, "test", config.evaluation.problems, "evaluation after")
    summary = _summary(run, after)
    run.directory.write_summary(summary)
    run.manager.wait_until_finished()
    accuracies = [name for name in after if "@" in name or name == "greedy"]
    run.console.print(
        results_table(*({name: part[name] for name in accuracies} for part in (run.meta["before"], after)))
    )
    run.console.print(f"total {summary['seconds']['total']:.0f} s; run directory: {config.directory}")
    return summary


def _warm_start(run: Run, key: jax.Array, newest: int | None, measure: Callable) -> Any:
    """Supervised steps on reference solutions, stopped early once sampled accuracy is where groups are mixed."""
    warm = run.config.warm_start
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, warm.learning_rate, warm.warmup_steps),
            optax.constant_schedule(warm.learning_rate),
        ],
        [warm.warmup_steps],
    )
    init, step = make_supervised_step(
        run.parts.model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
    )
    state = init(key)
    if newest is not None:
        state = checkpoints.restore(run.config.directory / "checkpoints", newest, state)
    if not warm.steps:
        return state.params
    batches = demonstration_batches(run.parts, run.data["train"])
    with Progress(warm.steps, WARM_START, run.console) as progress, run.timed(WARM_START):
        for index in range(int(state.step), warm.steps):
            state, metrics = step(state, demonstrations(batches[index]))
            done = index + 1
            shown = _finite(run, jax.device_get(metrics), done, WARM_START)
            if warm.probe_every_steps and done % warm.probe_every_steps == 0:
                probe = measure(state.params, "validation", run.config.task.validation_items, "probes")
                shown["validation/pass@1"] = probe["pass@1"]
            run.directory.write_metrics(done, {"stage": WARM_START} | shown)
            progress.update(done, shown)
            run.meta["warm_start_steps"] = done
            reached = warm.stop_at_accuracy is not None and shown.get("validation/pass@1", 0.0) >= warm.stop_at_accuracy
            if reached or done == warm.steps:
                break
            if done % run.config.checkpoints.every_steps == 0 or run.stopping:
                run.save(done, WARM_START, state)
                _stop_if_asked(run, done)
    return state.params


def _reinforce(run: Run, state: TrainState, prompts: Batches, measure: Callable) -> TrainState:
    """Reinforcement steps. Numbers are read one step late, so that the device never waits for the host."""
    config, offset = run.config, run.meta["warm_start_steps"]
    total, first = config.training.steps, int(state.step)
    rows = config.training.prompts_per_step * config.rollout.samples_per_prompt

    with (
        Progress(max(total, 1), REINFORCEMENT, run.console, sequences_per_step=rows) as progress,
        run.timed(REINFORCEMENT),
    ):

        def report(done: int, metrics: dict[str, Any], experience: Experience, items: list) -> None:
            shown = _finite(run, jax.device_get(metrics), done, REINFORCEMENT)
            run.meta["tokens"] += round(shown["completion_tokens"] * rows)
            run.directory.write_metrics(offset + done, {"stage": REINFORCEMENT} | shown)
            _write_samples(run, offset + done, done, experience, items)
            progress.update(done, shown)

        unread: tuple | None = None
        for index in range(first, total):
            batch, done = prompts[index], index + 1
            try:
                new_state, metrics, experience = run.parts.step.run(state, batch.prompts, batch.items)
            except RewardError as error:
                if unread is not None:
                    report(*unread)
                _save_before_leaving(run, offset + index, state)
                raise RewardError(
                    f"{error}. The state before step {done} is saved: mend the function and run "
                    f"jaxrl train --resume {config.directory}"
                ) from error
            if unread is not None:
                report(*unread)
            state, unread = new_state, (done, metrics, experience, batch.items)
            if config.evaluation.every_steps and done % config.evaluation.every_steps == 0 and done < total:
                held_out = measure(state.params, "validation", config.task.validation_items, "evaluation during")
                metrics |= {f"validation/{name}": value for name, value in held_out.items()}
            if done == first + 2:
                run.watch.expect_none(progress.message)
            if done % config.checkpoints.every_steps == 0 or run.stopping or done == total:
                report(*unread)
                unread = None
                run.save(offset + done, REINFORCEMENT, state)
                if done < total:
                    _stop_if_asked(run, offset + done)
        run.watch.allow()
    return state


def _save_before_leaving(run: Run, global_step: int, state: TrainState) -> None:
    if run.manager.latest_step() != global_step:  # it may be on its way to the disk already
        run.save(global_step, REINFORCEMENT, state)
    run.manager.wait_until_finished()


def _stop_if_asked(run: Run, global_step: int) -> None:
    if run.stopping:
        run.manager.wait_until_finished()
        raise Stopped(f"stopped at step {global_step}; go on with: jaxrl train --resume {run.config.directory}")


def _finite(run: Run, metrics: dict[str, Any], done: int, stage: str) -> dict[str, float]:
    """Metrics as floats; the first one that is not finite ends the run before a checkpoint can be spoiled."""
    shown = {name: float(value) for name, value in metrics.items()}
    bad = [name for name, value in shown.items() if not math.isfinite(value)]
    if bad:
        good, folder = run.manager.latest_step(), run.config.directory / "checkpoints"
        rest = "There is no checkpoint yet" if good is None else f"The last good checkpoint is step {good} in {folder}"
        raise TrainingError(
            f"{bad[0]} is {shown[bad[0]]} at step {done} of the {stage}; lower the learning rate or check the rewards. "
            f"{rest}"
        )
    return shown


def _write_samples(run: Run, global_step: int, done: int, experience: Experience, items: list) -> None:
    reporting = run.config.reporting
    if not reporting.samples_every_steps or done % reporting.samples_every_steps:
        return
    rows = spread(experience.tokens.shape[0], reporting.samples_per_report)
    fields = ("tokens", "length", "group", "rewards", "reward_components", "truncated")
    held = {name: jax.device_get(getattr(experience, name))[rows] for name in fields}
    decode = run.parts.tokenizer.decode
    run.directory.write_samples(
        global_step,
        [
            {
                "prompt": items[held["group"][i]]["body"],
                "completion": decode(held["tokens"][i][: held["length"][i]].tolist()),
                "answer": items[held["group"][i]]["answer"],
                "reward": held["rewards"][i],
                "truncated": bool(held["truncated"][i]),
            }
            | {term.name: held["reward_components"][i][c] for c, term in enumerate(run.parts.step.rewards)}
            for i in range(len(rows))
        ],
    )


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices, evenly spread, so that every level of a mixed data set is among them."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int)


@contextmanager
def _signals(run: Run):
    """SIGTERM and SIGINT ask for a stop at the end of the step; a second one is obeyed at once."""

    def ask(number: int, frame: Any) -> None:
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True
        run.console.print("stopping after this step; its state will be saved")

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread: signals are somebody else's
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _units(built: Parts) -> list[tuple[str, int | float | str, str]]:
    """What the sizes of a config imply, in units."""
    config = built.config
    training, rollout = config.training, config.rollout
    rows = training.prompts_per_step * rollout.samples_per_prompt
    per_update = rows // training.minibatches_per_epoch
    micro = training.sequences_per_microbatch or per_update
    return [
        ("prompts_per_step", training.prompts_per_step, "prompts"),
        ("samples_per_prompt", rollout.samples_per_prompt, "completions"),
        ("sequences per step", rows, "completions"),
        ("optimiser updates per step", training.epochs_per_batch * training.minibatches_per_epoch, "updates"),
        ("sequences per update", per_update, "completions"),
        ("sequences_per_microbatch", micro, "completions"),
        ("microbatches per update", per_update // micro, "microbatches"),
        ("tokens per step, at most", rows * (rollout.max_prompt_tokens + rollout.max_completion_tokens), "tokens"),
        ("reinforcement steps", training.steps, "steps"),
        ("devices", jax.device_count() if config.mesh.devices is None else config.mesh.devices, jax.default_backend()),
    ]


def _summary(run: Run, after: dict[str, float]) -> dict[str, Any]:
    run.charge()
    seconds = dict(run.meta["seconds"])
    seconds["total"] = sum(seconds.values())
    return {
        "name": run.config.name,
        "before": run.meta["before"],
        "after": after,
        "seconds": seconds,
        # Linux counts kibibytes.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "completion_tokens_sampled": run.meta["tokens"],
        "warm_start_steps": run.meta["warm_start_steps"],
        "steps": run.config.training.steps,
        "compilations": run.watch.count,
        "compilation_seconds": run.watch.seconds,
        "config_hash": run.meta["config_hash"],
        "data": run.meta["data"],
        "devices": [str(device) for device in jax.devices()],
        "versions": package_versions(),
    }


def latest_checkpoint(path: str | Path) -> tuple[Path, int]:
    """(checkpoints directory, step) that a run directory or a single checkpoint directory stands for.

    Raises:
      CheckpointError: when there is none.
    """
    path = Path(path)
    if path.name.isdigit() and (path / "state").is_dir():
        return path.parent, int(path.name)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    step = checkpoints.latest_step(folder)
    if step is None:
        raise checkpoints.CheckpointError(
            f"{path} holds no checkpoint; give a run directory (with checkpoints/ inside) or one checkpoint, "
            "for example runs/demo or runs/demo/checkpoints/120"
        )
    return folder, step
