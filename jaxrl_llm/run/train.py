"""A whole run on the host: warm start, evaluation, reinforcement, evaluation; checkpointed and resumable at any step.

Everything random is addressed by (seed, step), the data position is the step, and the whole state is in the
checkpoint, so a resumed run repeats the numbers of one that was never stopped.
"""

from __future__ import annotations

import resource
import signal
import time
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console

from jaxrl_llm.config import Config, as_tree, numeric_tree
from jaxrl_llm.data import Batches
from jaxrl_llm.evaluation import COUNTED, Grader, make_evaluate
from jaxrl_llm.experience import KeyUse
from jaxrl_llm.models import TransformerConfig, attention_path
from jaxrl_llm.parallel import described, hosts, layout
from jaxrl_llm.reporting import results_table, units_table
from jaxrl_llm.reporting.machine_report import package_versions
from jaxrl_llm.rollout.engine_http import require_model
from jaxrl_llm.run import checkpoints
from jaxrl_llm.run.compilation import CompilationWatch
from jaxrl_llm.run.directories import require_shared, run_directory
from jaxrl_llm.run.explain import trace
from jaxrl_llm.run.rehearsal import FILE, Rehearsal, make_rehearsal
from jaxrl_llm.run.setup import Parts, data_sets, encoded, grader, opened_parts, parts, prompt_batches
from jaxrl_llm.run.stages import REINFORCEMENT, WARM_START, Run, reinforce, spread, stored_rows, warm_start


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
      EngineError: when an external engine fails; the state before the failed step is saved.
      Stopped: after SIGTERM or SIGINT; the state is saved.
    """
    console = console or Console()
    started = time.monotonic()
    built = parts(config)
    trace(built)
    if (external := built.step.composition.external) is not None:
        require_model(external.engine)
    numbers = checkpoints.config_hash(numeric_tree(config))
    meta: dict[str, Any] = {"config_hash": numbers, "seconds": {}, "tokens": 0, "warm_start_steps": 0}
    folder = config.directory / "checkpoints"
    newest = hosts.from_main(checkpoints.latest_step(folder)) if resume else None
    if newest is not None:
        require_shared(folder / str(newest))
        meta = checkpoints.read_meta(folder, newest)
        if meta["config_hash"] != numbers:
            raise checkpoints.CheckpointError(
                f"run {config.directory} was written with config hash {meta['config_hash']}, but this config has "
                f"{numbers}; resume with the run's own config.yaml, or start a new run with another run_dir"
            )
    console.print(units_table(_units(built)))
    data = data_sets(config)
    grade = grader(built, data["validation"], data["test"])
    fingerprint = {split: part.fingerprint for split, part in data.items()} | built.fingerprint()
    if meta.setdefault("data", fingerprint) != fingerprint:
        changed = [name for name in fingerprint | meta["data"] if fingerprint.get(name) != meta["data"].get(name)]
        raise checkpoints.CheckpointError(
            f"run {config.directory} was started with other files: {', '.join(changed)} changed since (its data was "
            f"{meta['data']}, and is now {fingerprint}); restore them, or start a new run"
        )
    prompts = prompt_batches(built, data["train"])
    for split in ("validation", "test"):  # a held-out prompt that does not fit speaks now, not after the warm start
        encoded(built, data[split])
    with (
        run_directory(config.directory, as_tree(config), resume_step=(newest or 0) if resume else None) as directory,
        checkpoints.checkpoint_manager(folder, keep=config.checkpoints.keep) as manager,
        CompilationWatch() as watch,
        opened_parts(built) as ready,
    ):
        run = Run(ready, directory, manager, console, meta, watch, data, mark=started)
        if prompts.dropped:
            console.print(f"dropped {prompts.dropped} prompts longer than {config.rollout.max_prompt_tokens} tokens")
        with _signals(run):
            return _stages(run, prompts, newest, grade)


def _stages(run: Run, prompts: Batches, newest: int | None, grade: Grader) -> dict[str, Any]:
    config, folder = run.config, run.config.directory / "checkpoints"
    key = jax.random.key(config.seed)
    evaluate = make_evaluate(
        run.parts.model,
        grade,
        run.parts.tokenizer,
        samples_per_problem=config.evaluation.samples_per_problem,
        k=config.evaluation.k,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        sequences_per_batch=config.evaluation.sequences_per_batch,
        temperature=config.evaluation.temperature,
        overlong=config.data.overlong_prompts,
        mesh=run.parts.step.composition.mesh,
        rules=run.parts.step.composition.rules,
        environment=run.parts.environment,
        call=run.parts.call,
    )

    def measure(params: Any, split: str, problems: int, what: str) -> dict[str, float]:
        with run.timed(what):
            data = run.data[split]
            items = [data[i] for i in spread(len(data), problems)]
            return evaluate(params, items, jax.random.fold_in(key, KeyUse.EVALUATE))

    step, rehearsal, params = run.parts.step, None, None
    fresh = newest is None or run.meta["stage"] == WARM_START
    if fresh:
        params = warm_start(run, key, newest, measure)
        run.meta["before"] = measure(params, "test", config.evaluation.problems, "evaluation before")
        if config.rehearsal is not None:
            with run.timed("rehearsal split"):
                rehearsal = make_rehearsal(run.parts, params, run.data["train"], key)
                if hosts.is_main():
                    rehearsal.save(config.directory)
                run.meta["rehearsal"] = rehearsal.fingerprint
            run.console.print(f"rehearsal: {len(rehearsal)} answers stored, {len(rehearsal.explored)} prompts explored")
    elif config.rehearsal is not None:
        rehearsal = Rehearsal.load(config.directory)
        if rehearsal.fingerprint != run.meta["rehearsal"]:
            raise checkpoints.CheckpointError(
                f"{config.directory}/{FILE} is not what the run was started with; restore it, or start a new run"
            )
    if rehearsal is not None:
        source = run.data["train"]
        prompts = prompt_batches(run.parts, [source[int(number)] for number in rehearsal.explored])
    trained = run.parts.model.trained
    if not fresh and trained is not None:  # what adapters are added to is not in the checkpoint
        params = run.parts.initial_params(key)
    state = step.init(key, params)
    del params  # the state has a copy of its own
    if step.prime is not None:
        state = step.prime(state, run.placed(prompts[0].prompts))
    if fresh:
        run.save(run.meta["warm_start_steps"], REINFORCEMENT, state)
    else:
        assert newest is not None
        state = checkpoints.restore(folder, newest, state, trained=trained)
    state = reinforce(run, state, prompts, measure, stored_rows(run, rehearsal))
    after = measure(state.params, "test", config.evaluation.problems, "evaluation after")
    summary = _summary(run, after)
    run.directory.write_summary(summary)
    run.manager.wait_until_finished()
    accuracies = [name for name in after if name not in COUNTED]
    run.console.print(
        results_table(*({name: part[name] for name in accuracies} for part in (run.meta["before"], after)))
    )
    run.console.print(f"total {summary['seconds']['total']:.0f} s; run directory: {config.directory}")
    return summary


@contextmanager
def _signals(run: Run):
    """SIGTERM and SIGINT ask for a stop at the end of the step; a second one is obeyed at once."""

    def ask(number: int, frame: Any) -> None:
        if run.asked:
            raise KeyboardInterrupt
        run.asked = True
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
    mesh = built.step.composition.mesh
    per_update = rows // training.minibatches_per_epoch
    micro = training.sequences_per_microbatch or per_update
    attention = []
    if isinstance(built.model.config, TransformerConfig):
        widths = rollout.max_prompt_tokens, rollout.max_prompt_tokens + rollout.max_completion_tokens
        with layout(mesh, built.step.composition.rules):
            update = attention_path(built.model.config, queries=widths[1])
            decode = attention_path(built.model.config, queries=1, keys=widths[1])
        attention = [("attention", f"{update}, {decode}", "update, decoding")]
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
        *attention,
        ("devices", 1 if mesh is None else mesh.size, jax.default_backend()),
        ("mesh", described(mesh), built.mesh_reason),
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
        "programs_read": run.watch.read,
        "config_hash": run.meta["config_hash"],
        "data": run.meta["data"],
        "devices": [str(device) for device in jax.devices()],
        "versions": package_versions(),
    }
