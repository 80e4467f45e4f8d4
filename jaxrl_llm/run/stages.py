"""The stages of a run on the host: supervised warm start and reinforcement, with what they share.

A stage goes from the step that its state holds to the last one, writes every step's metrics, and saves its whole state
so that it can be taken up again at any checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxrl_llm.config import Config
from jaxrl_llm.data import Batches, DataSet, JsonlDataSet
from jaxrl_llm.experience import Experience, Source, TrainState
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting import Progress, RunDirectory
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.rollout.engine_http import EngineError
from jaxrl_llm.run import checkpoints
from jaxrl_llm.run.compilation import CompilationWatch
from jaxrl_llm.run.rehearsal import Rehearsal
from jaxrl_llm.run.setup import Parts, demonstration_batches
from jaxrl_llm.training.stored import written_rows
from jaxrl_llm.training.supervised import demonstrations, make_supervised_step

WARM_START, REINFORCEMENT = "warm start", "reinforcement"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and where the last good checkpoint is."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class Run:
    """What the stages of one run share. `training.run` makes one.

    Attributes:
      parts: what the config describes.
      directory: open files of the run.
      manager: its checkpoints.
      console: where people read.
      meta: what a checkpoint records beside the state: stage, counts, the evaluation before training, seconds.
      watch: counts compilations.
      asked: a signal arrived.
      stopping: the run ends at the end of this step; the same on all processes.
      mark, charged_to: since when, and to which part, time is being charged.
    """

    parts: Parts
    directory: RunDirectory
    manager: Any
    console: Console
    meta: dict[str, Any]
    watch: CompilationWatch
    data: dict[str, DataSet | JsonlDataSet] = field(default_factory=dict)
    asked: bool = False
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
        checkpoints.save(self.manager, global_step, state, self.meta, trained=self.parts.model.trained)

    def placed(self, rows: Any) -> Any:
        """Rows of a whole batch where the step's devices want them; each process hands over its own."""
        composition = self.parts.step.composition
        return hosts.placed_rows(rows, composition.mesh, composition.rules)


def warm_start(run: Run, key: jax.Array, newest: int | None, measure: Callable) -> Any:
    """Supervised steps on reference solutions, stopped early once sampled accuracy is where groups are mixed."""
    warm, given = run.config.warm_start, run.parts.initial_params(key)
    if not warm.steps:
        return given
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, warm.learning_rate, warm.warmup_steps),
            optax.constant_schedule(warm.learning_rate),
        ],
        [warm.warmup_steps],
    )
    init, step = make_supervised_step(
        run.parts.model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0)),
        mesh=run.parts.step.composition.mesh,
        rules=run.parts.step.composition.rules,
    )
    state = init(key, given)
    if newest is not None:
        folder, trained = run.config.directory / "checkpoints", run.parts.model.trained
        state = checkpoints.restore(folder, newest, state, trained=trained)
    batches = demonstration_batches(run.parts, run.data["train"], warm.sequences_per_step)
    with Progress(warm.steps, WARM_START, run.console) as progress, run.timed(WARM_START):
        for index in range(int(state.step), warm.steps):
            state, metrics = step(state, run.placed(demonstrations(batches[index])))
            done = index + 1
            shown = _finite(run, jax.device_get(metrics), done, WARM_START)
            if warm.probe_every_steps and done % warm.probe_every_steps == 0:
                probe = measure(state.params, "validation", run.config.evaluation.problems, "probes")
                shown["validation/pass@1"] = probe["pass@1"]
            run.directory.write_metrics(done, {"stage": WARM_START} | shown)
            progress.update(done, shown)
            run.meta["warm_start_steps"] = done
            run.stopping = hosts.agreed_stop(run.asked)
            reached = warm.stop_at_accuracy is not None and shown.get("validation/pass@1", 0.0) >= warm.stop_at_accuracy
            if reached or done == warm.steps:
                break
            if done % run.config.checkpoints.every_steps == 0 or run.stopping:
                run.save(done, WARM_START, state)
                _stop_if_asked(run, done)
    return state.params


def stored_rows(run: Run, rehearsal: Rehearsal | None) -> Callable[[int], Experience | None]:
    """The rows that a step learns from beside its samples, by step; the same whatever was asked for before."""
    config = run.config
    width, key = config.rollout.max_completion_tokens, jax.random.key(config.seed)
    if rehearsal is not None and config.rehearsal is not None:
        count = config.rehearsal.sequences_per_step
        return lambda step: rehearsal.batch(key, step, count, answer_width=width)
    if config.supervised is not None:
        return supervised_rows(run.parts, run.data)
    return lambda step: None


def supervised_rows(parts: Parts, sets: Mapping[str, DataSet | JsonlDataSet]) -> Callable[[int], Experience]:
    """Reference completions by step; of the validation split too, marked and of weight 0, where that is asked for."""
    config, stored = parts.config, parts.step.composition.stored
    if config.supervised is None or stored is None:
        raise ValueError("the config has no section supervised")
    count, names = config.supervised.sequences_per_step, ("prompt_tokens", "prompt_length", "prompt_id")
    validated = "validation" in stored.provides
    splits = ("train", "validation") if validated else ("train",)
    batches = [demonstration_batches(parts, sets[split], count) for split in splits]

    def rows(step: int) -> Experience:
        both = [b[step] for b in batches]
        arrays = {n: jnp.concatenate([getattr(b, n) for b in both]) for n in (*names, "tokens", "length")}
        trained = jnp.concatenate([jnp.asarray(b.mask) for b in both]) > 0
        held_out = jnp.repeat(jnp.arange(len(both), dtype=jnp.float32), count)
        marks = {"validation": held_out} if validated else {}
        written = written_rows(**arrays, answer_width=config.rollout.max_completion_tokens, **marks)
        # Losses on written rows read the source alone: in a conversation, what is not trained on counts as observed.
        source = jnp.where((written.source == Source.DEMONSTRATION) & ~trained, Source.OBSERVATION, written.source)
        return replace(written, weight=1.0 - held_out, source=source.astype(jnp.int8))

    return rows


def reinforce(
    run: Run, state: TrainState, prompts: Batches, measure: Callable, stored: Callable[[int], Experience | None]
) -> TrainState:
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
            _write_samples(run, offset + done, done, experience, items, first=done == first + 1)
            progress.update(done, shown)

        unread: tuple | None = None
        step, widths = run.parts.step, set()
        for index in range(first, total):
            batch, done = prompts[index], index + 1
            sampled = batch.prompts if step.prime is None else prompts[index + 1].prompts
            new_width = (width := sampled.tokens.shape[1]) not in widths
            if new_width and widths:
                run.watch.allow()
                progress.message(f"step {done} is the first with prompts of {width} tokens: its program is compiled")
            widths.add(width)
            sampled = run.placed(sampled)
            try:
                new_state, metrics, experience = step.run(state, sampled, batch.items, run.placed(stored(index)))
            except (RewardError, EngineError) as error:
                if unread is not None:
                    report(*unread)
                _save_before_leaving(run, offset + index, state)
                what = "the function" if isinstance(error, RewardError) else "what the engine lacks"
                raise type(error)(
                    f"{error}. The state before step {done} is saved: mend {what} and run "
                    f"jaxrl train --resume {config.directory}"
                ) from error
            if unread is not None:
                report(*unread)
            state, unread = new_state, (done, metrics, experience, batch.items)
            if config.evaluation.every_steps and done % config.evaluation.every_steps == 0 and done < total:
                run.watch.allow()  # a resumed run compiles its evaluation here
                held_out = measure(state.params, "validation", config.evaluation.problems, "evaluation during")
                if done > first + 2:
                    run.watch.expect_none(progress.message)
                metrics |= {f"validation/{name}": value for name, value in held_out.items()}
            if done == first + 2 or (new_width and done > first + 2):
                run.watch.expect_none(progress.message)
            run.stopping = hosts.agreed_stop(run.asked)
            if done % config.checkpoints.every_steps == 0 or run.stopping or done == total:
                report(*unread)
                unread = None
                run.watch.allow()  # on a mesh, orbax compiles how it cuts arrays, in a resumed run here
                run.save(offset + done, REINFORCEMENT, state)
                if done >= first + 2:
                    run.watch.expect_none(progress.message)
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


def _write_samples(run: Run, global_step: int, done: int, experience: Experience, items: list, *, first: bool) -> None:
    reporting = run.config.reporting
    due = bool(reporting.samples_every_steps) and done % reporting.samples_every_steps == 0
    # Over several processes, rows are gathered by a program, which is compiled with those of the first step.
    if not due and not (reporting.samples_every_steps and first and jax.process_count() > 1):
        return
    rows = spread(experience.tokens.shape[0], reporting.samples_per_report)
    fields = ("tokens", "length", "group", "rewards", "reward_components", "truncated")
    held = {name: value[rows] for name, value in hosts.host_copy({n: getattr(experience, n) for n in fields}).items()}
    if not due:
        return
    decode = run.parts.tokenizer.decode
    run.directory.write_samples(
        global_step,
        [
            {
                "prompt": items[held["group"][i] % len(items)]["body"],
                "completion": decode(held["tokens"][i][: held["length"][i]].tolist()),
                "answer": items[held["group"][i] % len(items)]["answer"],
                "reward": held["rewards"][i],
                "truncated": bool(held["truncated"][i]),
            }
            | {term.name: held["reward_components"][i][c] for c, term in enumerate(run.parts.step.composition.rewards)}
            for i in range(len(rows))
        ],
    )


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices, evenly spread, so that every level of a mixed data set is among them."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int)
