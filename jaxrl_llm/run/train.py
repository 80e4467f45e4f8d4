"""A whole run on the host: its stages in order, with an evaluation before and after; resumable at any step.

Everything random is addressed by (seed, step), the data position is the step, and the whole state is in the
checkpoint, so a resumed run repeats the numbers of one that was never stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from rich.console import Console

from jaxrl_llm.config import BranchConfig, Config, as_tree, numeric_tree, placement_tree
from jaxrl_llm.data import Batches
from jaxrl_llm.endpoints import require_model
from jaxrl_llm.evaluation import Grader
from jaxrl_llm.experience import NetworkState, TrainState
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting import units_table
from jaxrl_llm.reporting.ownership import owned
from jaxrl_llm.run import checkpoints, integrity, stored_states
from jaxrl_llm.run.across_stages import measure_across
from jaxrl_llm.run.batches import encoded, grader, prompt_batches
from jaxrl_llm.run.compilation import CompilationWatch
from jaxrl_llm.run.directories import mirrored, require_new, require_shared, run_directory
from jaxrl_llm.run.early_stopping import require_metric
from jaxrl_llm.run.explain import metric_names, trace
from jaxrl_llm.run.failures import continued, named
from jaxrl_llm.run.goodput import Lifetime
from jaxrl_llm.run.host_processes import guarded_functions, opened_environment
from jaxrl_llm.run.interruption import Abandoned, Interruption, attended
from jaxrl_llm.run.live_report import reporting_of
from jaxrl_llm.run.measured import measured_by, measured_on
from jaxrl_llm.run.overview import result_tables, summary_of, units
from jaxrl_llm.run.problems import data_sets, fingerprint_of, left_out, own_data
from jaxrl_llm.run.prompt_choices import first_batch
from jaxrl_llm.run.remarks import before_the_steps
from jaxrl_llm.run.restored import require_branch
from jaxrl_llm.run.resuming import move_damaged, restored_state, resume_step, with_local
from jaxrl_llm.run.rewards_tried import answers_of, require_read, try_readings
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.run.staged import staged
from jaxrl_llm.run.stages import Run, Stage, Stopped, run_stage, stage_data, written_of
from jaxrl_llm.run.step_trace import StepTrace
from jaxrl_llm.run.stored_answers import FILE, StoredAnswers, stored_answers
from jaxrl_llm.training.initial import initial_state


def train(
    config: Config,
    *,
    resume: bool = False,
    exact: bool = False,
    grace: float | None = None,
    console: Console | None = None,
    steps_traced: StepTrace | None = None,
) -> dict[str, Any]:
    """Run a config from start to final table, or resume a stopped run.

    Args:
      config: config of the run; when resuming, its settings that affect numbers must equal those of the stored config.
      resume: continue from the newest undamaged checkpoint in `config.directory`.
      exact: refuse to continue from an earlier checkpoint if the newest is damaged.
      grace: seconds from the first signal to the end, whatever is under way; None waits for the end of the step.
      console: where progress is shown; None for standard output.
      steps_traced: what traces some of the steps; None for none.

    Returns:
      The summary that is also written to summary.json.

    Raises:
      ValueError: for anything in the config or the run directory that cannot work; before compute is spent.
      CheckpointError: resuming with another config or other data, or without a good checkpoint.
      TrainingError: when a number stops being finite.
      RewardError, GraderError: when a function fails; in a step, the state before it is saved.
      EndpointError: when an external engine fails; the state before the failed step is saved.
      StorageError: when the run directory cannot be written any more.
      PassingError: when storage or a device fails in a way that may pass; the run may be started again.
      Stopped: after SIGTERM, SIGINT or SIGHUP; the state is saved.
      KeyboardInterrupt: after Ctrl-C before the run has begun; later the second signal ends the process.
    """
    console = console or Console()
    say = _saying(console)
    folder = config.directory / "checkpoints"
    interruption = Interruption(
        config.directory,
        say,
        lambda: checkpoints.latest_step(folder),
        grace,
        config.faults.stalled_after_medians,
        place=config.place,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(named(config.directory, interruption.way_on))
        stack.enter_context(continued(interruption))
        mirror = stack.enter_context(mirrored(config, resume, say))
        interruption.brought = str if mirror is None else mirror.brought
        if resume and hosts.is_main():
            stack.enter_context(owned(config.directory, say=say))
        while True:
            try:
                return _train(config, resume, exact, console, interruption, trace=steps_traced, mirror=mirror)
            except checkpoints.Damaged as error:
                if exact or not resume or error.directory != folder:  # it is of the run that init_from names
                    raise
                say(f"{error}; trying the one before it")
                move_damaged(config, error.step - 1, say, apart=mirror is not None and mirror.apart)
            except Abandoned:  # between steps
                raise Stopped(f"stopped; {interruption.way_on()}", interruption.number or 15) from None
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped at once; {interruption.way_on()}") from None


def _saying(console: Console) -> Callable[[str], None]:
    """Prints a sentence unchanged: paths are not wrapped, and brackets are not read as markup."""
    return partial(console.print, soft_wrap=True, markup=False, highlight=False)


def _train(
    config: Config, resume: bool, exact: bool, console: Console, interruption: Interruption, **shared: Any
) -> dict[str, Any]:
    """`shared` holds the attributes of `Run` that all stages have in common."""
    started = time.monotonic()
    stages = [Stage(**described) for described in staged(config)]
    built = stages[-1].parts
    _require_traced(stages, shared["trace"])
    if not resume and hosts.is_main():
        require_new(config.directory)
    report, logging = reporting_of(config, console)
    rollout = built.step.composition.rollout
    if rollout is not None and rollout.engine is not None:
        require_model(rollout.engine.engine)
    meta: dict[str, Any] = {
        "config_hash": checkpoints.config_hash(numeric_tree(config)),
        "config": numeric_tree(config),
        "placement": placement_tree(config),
        "seconds": {},
        "tokens": 0,
        "warm_start_steps": 0,
        "steps_before": 0,
        "stage": stages[0].name,
    }
    folder = config.directory / "checkpoints"
    newest, apart = None, shared["mirror"] is not None and shared["mirror"].apart
    if resume:
        asked = {"exact": exact, "first_saved": stages[0].first_saved, "apart": apart}
        newest = resume_step(config, **asked, say=_saying(console))
    if newest is not None:
        require_shared(folder / str(newest))
        meta = checkpoints.read_meta(folder, newest)
        if moved := checkpoints.require_own_config(config, meta):
            _saying(console)(moved)
        meta["placement"] = placement_tree(config)
    elif config.init_from is not None:
        require_branch(stages[0].parts)
    mesh = built.step.composition.resources.placement.mesh
    local, newest, meta = with_local(config, mesh, newest, meta, _saying(console))
    data = data_sets(built.config) if built.config.has_problems else {}
    sets = {stage.name: own_data(stage, stages[-1], data) for stage in stages}
    require_read({stage.name: stage.parts for stage in stages}, sets)
    held_out = [data[split] for split in ("validation", "test") if split in data and answers_of(data[split])]
    grade = grader(built, *held_out) if held_out else None
    if grade is None and any(stage.stop_at_accuracy is not None for stage in stages):
        raise ValueError("warm_start.stop_at_accuracy is set, but the data has no reference answers; leave it out")
    _require_same_data(config, meta, fingerprint_of(stages, sets, data))
    prompts, rows = _batches(stages, sets)
    for split in ("validation", "test") if data else ():
        encoded(built, data[split])
    for stage in stages:
        try_readings(stage.parts, sets[stage.name])
    first_step = (newest or 0) if resume else None
    console.print(units_table(units(built)))
    for note in before_the_steps(config, stages, meta):
        _saying(console)(note)
    if resume:
        move_damaged(config, newest, _saying(console), apart=apart)
    opened = {"resume_step": first_step, "mirror": shared["mirror"], **logging}
    with (
        run_directory(config.directory, as_tree(config), **opened) as directory,
        _manager(config, apart) as manager,
        CompilationWatch() as watch,
        opened_environment(config, built, interruption.give_up_the_step) as ready,
        guarded_functions(config, [stage.parts.step.composition for stage in stages], interruption.give_up_the_step),
    ):
        interruption.opened = True
        made = (config, ready, directory, manager, console, meta, watch, data, sets)
        run = Run(*made, mark=started, interruption=interruption, report=report, local=local, **shared)
        run.lifetime = Lifetime(directory, started)
        files = {stage.name: feed.dropped for stage in stages for feed in stage.parts.feeds if feed.dropped}
        for line in left_out(data, prompts, config.rollout.max_prompt_tokens, files):
            _saying(console)(line)
        with attended(interruption):
            summary = _run(run, stages, prompts, rows, newest, grade)
        if local is not None:
            local.close(finished=True)
        return summary


def _batches(stages: Sequence[Stage], sets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(batches of prompts, written rows by step) of each stage, by name.

    Raises:
      ValueError: for what any stage refuses, before the first one runs.
    """
    prompts, rows = {}, {}
    for stage in stages:
        try:
            if stage.samples:
                prompts[stage.name] = prompt_batches(stage.parts, sets[stage.name]["train"])
            rows[stage.name] = written_of(stage.parts, sets[stage.name])
        except ValueError as error:
            if len(stages) == 1:
                raise
            raise ValueError(f"{stage.name}: {error}") from None
    return prompts, rows


def _require_same_data(config: Config, meta: dict[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a run would be resumed with other files; records the files of a new run."""
    if meta.setdefault("data", fingerprint) != fingerprint:
        changed = [name for name in fingerprint | meta["data"] if fingerprint.get(name) != meta["data"].get(name)]
        raise checkpoints.CheckpointError(
            f"run {config.directory} was started with other files: {', '.join(changed)} changed since (its data was "
            f"{meta['data']}, and is now {fingerprint}); restore them, or start a new run"
        )


def _require_traced(stages: Sequence[Stage], profiled: StepTrace | None) -> None:
    """Raise ValueError for sizes that cannot work, for a stop condition or a best checkpoint by a metric that is not
    measured, and for a profile of steps that the run does not have."""
    if profiled is not None and profiled.last > (steps := sum(stage.steps for stage in stages)):
        raise ValueError(
            f"--profile asks for steps {profiled.first} to {profiled.last}, but the run has {steps} (they count over "
            "all stages, as in metrics.jsonl); choose earlier steps"
        )
    for stage in stages:
        trace(stage.parts)
        config = stage.parts.config
        if (rule := config.training.stop_when) is not None:
            require_metric("training.stop_when.metric", rule.metric, stage.name, config, metric_names(stage.parts))
    if config.checkpoints.keep_best:
        require_metric("checkpoints.best_metric", config.checkpoints.best_metric, stage.name, config)


def _manager(config: Config, apart: bool) -> Any:
    kept = config.checkpoints
    return checkpoints.checkpoint_manager(
        config.directory / "checkpoints",
        keep=kept.keep,
        keep_every_steps=kept.keep_every_steps,
        keep_best=kept.keep_best,
        best_is=kept.best_is,
        apart=apart,
    )


def _run(
    run: Run,
    stages: Sequence[Stage],
    prompts: dict[str, Batches],
    rows: Mapping[str, Any],
    newest: int | None,
    grade: Grader | None,
) -> dict[str, Any]:
    """Run the remaining stages, from the one whose state was saved."""
    config, key, call = run.config, jax.random.key(run.config.seed), run.parts.call
    measure = measured_by(run, stages[-1].parts, grade, key)
    names = [stage.name for stage in stages]
    begin = names.index(run.meta["stage"])
    state, held = _before(stages[:begin], key)
    for number in range(begin, len(stages)):
        stage = replace(stages[number], parts=replace(stages[number].parts, call=call))
        run.parts, fresh = stage.parts, newest is None
        params = stage.parts.initial_params(key) if state is None else state.params
        if not fresh and state is not None and stage.parts.model.trained is not None:
            params = stage.parts.initial_params(key)  # what adapters are added to is not in the checkpoint
        given = stage.parts.given() | _carried(stage.parts, held, stages[:number])
        if "before" not in run.meta and stage.first_saved:
            run.meta["before"] = measure(params, "test", config.evaluation.problems, "evaluation before")
        stored = _stored(run, stage, params, key, fresh)
        if stored is not None:
            source = run.sets[stage.name]["train"]
            explored = [source[int(item)] for item in stored.explored]
            prompts[stage.name] = prompt_batches(stage.parts, explored)
        batches = prompts.get(stage.name)
        state = stage.parts.step.init(key, params, given)
        later = {
            name
            for place in range(number + 1, len(stages))
            for name in _carried(stages[place].parts, held, stages[:place])
        }
        run.waiting_networks = {name: NetworkState(held[name]) for name in later - state.networks.keys()}
        held = {}  # the state has copies of its own
        del params, given
        if fresh and number == 0 and config.init_from is not None and config.init_from.optimizer:
            state = _with_optimizer_of(config.init_from, state)
        if stage.parts.step.priming and batches is not None:
            begin_with = first_batch(batches, state)
            state = stage.parts.step.prime(state, run.placed(begin_with.prompts), begin_with.items, call)
        if not fresh:
            kept = checkpoints.written_networks(stage.parts, state) | run.waiting_networks
            assert newest is not None
            restored = restored_state(run, newest, replace(state, networks=kept), stage.parts.model.trained)
            run.waiting_networks = {name: restored.networks.pop(name) for name in run.waiting_networks}
            state = replace(restored, networks={**state.networks, **restored.networks})
            newest = None
        elif stage.first_saved:
            run.save(run.meta["steps_before"], stage.name, state)
        data = stage_data(stage, batches, rows[stage.name], stored)
        state = run_stage(run, stage, state, data, measure, last=number == len(stages) - 1)
        if config.evaluation.across_stages and stage.first_saved:
            measure_across(run, stages, stage, state.params, partial(measured_on, run, key))
        held = {name: one.params for name, one in (run.waiting_networks | state.networks).items()}
        if not stage.first_saved:
            run.meta["warm_start_steps"] = int(state.step)
    assert state is not None  # a run has at least one stage
    return _ended(run, state, measure)


def _with_optimizer_of(branch: BranchConfig, state: TrainState) -> TrainState:
    """The state with the policy's optimiser state of another run."""
    at, policy = integrity.branch_checkpoint(branch.path, branch.step), state.networks["policy"]
    held = stored_states.restore_part(at.parent, int(at.name), policy.optimizer_state, part="optimizer_state")
    return replace(state, networks={**state.networks, "policy": replace(policy, optimizer_state=held)})


def _carried(parts: Parts, held: Mapping[str, PyTree], before: Sequence[Stage]) -> dict[str, PyTree]:
    """The networks of earlier stages that this stage continues with instead of initialising them.

    Networks with a head, those that learn, and those that learned in a stage `before`, unless they follow another
    network in this one. Copies of the policy start anew.
    """
    networks = parts.step.composition.networks
    learned = {name for stage in before for name in stage.parts.step.composition.learning}

    def continues(name: str) -> bool:
        one = networks[name]
        fixed = name in learned and not (one.moves or one.always_origin)
        return one.head is not None or one.optimizer is not None or fixed

    return {name: params for name, params in held.items() if name in networks and continues(name)}


def _before(stages: Sequence[Stage], key: Any) -> tuple[TrainState | None, dict[str, PyTree]]:
    """A state with the shape of the last of these stages, and the networks that they pass on."""
    state, held = None, {}
    for number, stage in enumerate(stages):
        given = _carried(stage.parts, held, stages[:number])
        shapes = jax.eval_shape(partial(initial_state, stage.parts.step.composition), key, None, given)
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), replace(shapes, key=jnp.zeros(())))
        state = replace(state, key=key)
        held |= {name: one.params for name, one in state.networks.items()}
    return state, held


def _stored(run: Run, stage: Stage, params: Any, key: Any, fresh: bool) -> StoredAnswers | None:
    """Stored answers of the stage's initial policy, made or read; None if no source needs them."""
    wanted = next((feed.stored for feed in stage.parts.feeds if feed.stored), None)
    if wanted is None:
        return None
    if not fresh:
        stored = StoredAnswers.load(run.config.directory)
        if stored.fingerprint != run.meta["stored_answers"]:
            raise checkpoints.CheckpointError(
                f"{run.config.directory}/{FILE} is not what the run was started with; restore it, or start a new run"
            )
        return stored
    with run.timed("stored answers"):
        stored = stored_answers(stage.parts, params, run.sets[stage.name]["train"], key, **wanted)
        if hosts.is_main():
            stored.save(run.config.directory)
        run.meta["stored_answers"] = stored.fingerprint
    run.console.print(f"answers stored: {len(stored)}; prompts explored: {len(stored.explored)}")
    return stored


def _ended(run: Run, state: TrainState, measure: Callable) -> dict[str, Any]:
    """After the last stage: evaluate the run, and write and print its summary."""
    after = measure(state.params, "test", run.config.evaluation.problems, "evaluation after")
    summary = summary_of(run, after)
    run.directory.write_summary(summary)
    run.manager.wait_until_finished()
    for table in result_tables(run, after):
        run.console.print(table)
    page = None if run.report is None else run.report.refresh(now=True)
    told = "" if page is None else f"; report: {page}"
    _saying(run.console)(f"total {summary['seconds']['total']:.0f} s; run directory: {run.config.place}{told}")
    return summary
