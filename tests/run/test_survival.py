"""Runs under other failures than a kill: damage, lost records, two owners, closed output, signals, disks."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxrl_llm
from jaxrl_llm import advantages, cli, losses
from jaxrl_llm.commands.output import Lasting
from jaxrl_llm.config import Config, load_config
from jaxrl_llm.endpoints import EndpointError
from jaxrl_llm.evaluation import GraderError
from jaxrl_llm.experience import Prompts
from jaxrl_llm.reporting import RunDirectory, ownership
from jaxrl_llm.reporting.metric_alarms import Alarms
from jaxrl_llm.reporting.metric_table import undefined
from jaxrl_llm.reporting.run_directory import read_records
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.rollout.host_environments import EnvironmentFailure
from jaxrl_llm.run import checkpoints, failures
from jaxrl_llm.run.interruption import Abandoned, Interruption, attended
from jaxrl_llm.run.nonfinite import not_finite
from jaxrl_llm.run.resuming import resume_step
from jaxrl_llm.training import Resources, Rollout, make_train_step

ROOT = Path(jaxrl_llm.__file__).parents[1]
STEPS = 18


@pytest.fixture
def copied(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run.directory, tmp_path / "run"))


def cut(checkpoint: Path) -> None:
    for path in checkpoint.glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[:-20])


def config_of(run: Path) -> Config:
    """The config of a run that was copied."""
    return load_config(run / "config.yaml", [f"run_dir={run}"])


def refused(capsys, *arguments: str, status: int = 2) -> str:
    assert cli.main(arguments) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_orbax_notes_beside_the_arrays_may_be_damaged_as_well(copied, capsys):
    (notes,) = (copied / "checkpoints" / "18").glob("state/array_metadatas/*")
    notes.write_text(notes.read_text().replace("write_shape", "writm_shape", 1))
    assert "cannot be restored" in refused(capsys, "train", "--resume", str(copied), "--exact")
    assert cli.main(["train", "--resume", str(copied)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "is damaged: it cannot be restored (KeyError: 'write_shape'); trying the one before it" in shown


@pytest.mark.slow
def test_evaluation_takes_the_newest_good_checkpoint(copied, capsys):
    cut(copied / "checkpoints" / "18")
    assert cli.main(["sample", str(copied), "--prompt", "A:1+2", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("warning: checkpoint 18 is damaged: ")
    assert "take" in refused(capsys, "sample", str(copied / "checkpoints" / "18"), "--prompt", "A:1+2")


@pytest.mark.fault(
    "storage",
    "`checkpoints/` is missing, records exist",
    "refused with status 2: starting anew would erase the records",
)
def test_records_are_not_erased_where_checkpoints_are_gone(copied, capsys):
    shutil.rmtree(copied / "checkpoints")
    before = (copied / "metrics.jsonl").read_bytes()
    said = refused(capsys, "train", "--resume", str(copied))
    (copied / "checkpoints").mkdir()  # an empty directory has the same result
    with pytest.raises(checkpoints.CheckpointError, match="but no checkpoint in checkpoints/"):
        resume_step(config_of(copied), exact=False, first_saved=True, say=print)
    assert f"has records up to step {STEPS}, but no checkpoint in checkpoints/" in said
    assert "restore the checkpoints from a copy, or start a new run with another run_dir" in said
    assert (copied / "metrics.jsonl").read_bytes() == before


@pytest.mark.fault(
    "storage", "records are truncated, empty or missing, checkpoints exist", "a message; the remaining records are kept"
)
def test_records_that_were_lost_are_told_of_and_the_rest_is_kept(copied):
    file, config = copied / "metrics.jsonl", config_of(copied)
    lines = file.read_text().splitlines(keepends=True)
    for left, said in ((0, "has no records"), (None, "has no records"), (10, "ends at step 10")):
        file.unlink() if left is None else file.write_text("".join(lines[:left]))
        told: list[str] = []
        assert resume_step(config, exact=False, first_saved=True, say=told.append) == STEPS
        assert f"metrics.jsonl {said}, but the checkpoint is of step 18" in told[-1]
    with RunDirectory(copied, {}, resume_step=STEPS):
        pass
    assert len(read_records(file)) == 10


# ---- one owner ------------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from pathlib import Path
from jaxrl_llm.reporting.ownership import owned
with owned(Path(sys.argv[1]), beat=0.1):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_owner(copied):
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(copied)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.fault(
    "storage", "a second process is started on the run", "refused with the owner's process, host and start time"
)
def test_a_run_that_goes_on_is_not_started_twice(copied, other_owner, capsys):
    said = refused(capsys, "train", "--resume", str(copied))
    assert f"belongs to process {other_owner.pid} on " in said
    assert "running since 2" in said
    other_owner.kill()
    other_owner.wait()
    with ownership.owned(copied):  # the lock ended with its process, so there is no wait
        assert json.loads((copied / ownership.FILE).read_text())["pid"] == os.getpid()
    assert (copied / ownership.FILE).read_text() == ""


@pytest.mark.fault(
    "storage", "the file system has no locks", "a file that the owner rewrites shows whether it is alive"
)
def test_without_locks_a_heartbeat_says_who_lives(copied, other_owner, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "flock", no_locks)
    told: list[str] = []
    with pytest.raises(ownership.OwnedError, match=f"process {other_owner.pid} "), ownership.owned(copied, beat=0.15):
        pass
    other_owner.kill()
    other_owner.wait()
    with ownership.owned(copied, beat=0.15, say=told.append):
        pass
    assert len(told) == 1
    assert "waiting 0.45 s whether it still lives" in told[0]


# ---- signals --------------------------------------------------------------------------------------------------------


# For a run that ends in its first steps, so that no other program is compiled.
EARLY = ["warm_start.steps=4", "warm_start.probe_every_steps=0", "checkpoints.every_steps=1"]
# A run of four steps without a warm start.
SHORT = ["warm_start.steps=0", "training.steps=4", "evaluation.problems=2", "evaluation.every_steps=0"]
SHORT += ["losses=[clipped_surrogate]", "checkpoints.every_steps=1"]


def signalled(numbers: list[int], *arguments: str, at: int = 2) -> tuple[int, str, str]:
    """`jaxrl` in this process; signals are sent one after another when the metrics of a step are written."""

    def write_and_ask(self, step, metrics):
        write(self, step, metrics)
        if step == at:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.01)

    write, out, err = RunDirectory.write_metrics, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(RunDirectory, "write_metrics", write_and_ask)
        return cli.main(arguments), out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "number, status",
    [
        pytest.param(
            signal.SIGINT,
            130,
            id="SIGINT",
            marks=[pytest.mark.slow, pytest.mark.fault("signals", "Ctrl-C (SIGINT)", "as SIGTERM, with status 130")],
        ),
        pytest.param(
            signal.SIGHUP,
            129,
            id="SIGHUP",
            marks=[pytest.mark.slow, pytest.mark.fault("signals", "SIGHUP", "as SIGTERM, with status 129")],
        ),
    ],
)
def test_a_signal_stops_a_run_in_good_order(micro_yaml, tmp_path, number, status):
    found, _, err = signalled([number], "train", str(micro_yaml), f"run_dir={tmp_path / 'run'}", *EARLY)
    assert found == status
    assert err == f"stopped at step 3; go on with: jaxrl train --resume {tmp_path / 'run'}\n"
    assert checkpoints.latest_step(tmp_path / "run" / "checkpoints") == 3


@pytest.mark.fault(
    "signals",
    "a second signal, also while a program runs or is compiled",
    "the process ends at once with 128 plus the number of that signal, and names the last checkpoint",
)
@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_second_signal_ends_the_process_while_the_main_thread_is_busy(ends, tmp_path, second, status):
    seen, done = ends
    with attended(Interruption(tmp_path, lambda text: None, lambda: 40)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)  # the main thread goes on, and raises nothing
        assert done.wait(5)
    way_on = f"the last good checkpoint is step 40; go on with: jaxrl train --resume {tmp_path}"
    assert seen == [(status, f"stopped at once; {way_on}")]


DEAF = """
import os, signal, sys
from pathlib import Path
from jaxrl_llm.run.interruption import Interruption, attended

with attended(Interruption(Path(sys.argv[1]), print, lambda: 40)):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    while True:  # neither ends nor lets the handlers of the main thread do anything
        pass
"""


@pytest.mark.slow
def test_a_process_whose_main_thread_never_returns_ends_at_the_second_signal(tmp_path):
    ended = subprocess.run([sys.executable, "-c", DEAF, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 143
    assert "stopped at once; the last good checkpoint is step 40; go on with: " in ended.stderr


@pytest.mark.fault("signals", "SIGHUP under `nohup`", "an ignored signal stays ignored")
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with attended(Interruption(Path(), print, lambda: None)) as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert not interruption.asked
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault(
    "signals", "Ctrl-C before the first step, or in another command", "a message of one line, status 130"
)
@pytest.mark.parametrize("command", ["eval", "sample", "explain", "export", "train"])
def test_ctrl_c_before_the_steps_is_one_line(finished_run, micro_yaml, tmp_path, monkeypatch, capsys, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    words = {
        "eval": [str(finished_run.directory)],
        "sample": [str(finished_run.directory), "--prompt", "A:1+2"],
        "explain": [str(micro_yaml)],
        "export": [str(finished_run.directory), str(tmp_path / "out")],
        "train": [str(micro_yaml), f"run_dir={tmp_path / 'run'}"],
    }[command]
    monkeypatch.setattr("jaxrl_llm.run.policy_parts.described_policy", interrupted)  # which all of them call first
    assert cli.main([command, *words]) == 130
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "interrupted" in said or "stopped at once; no checkpoint yet" in said


class Ended(Exception):
    pass


@pytest.fixture
def ends(monkeypatch, tmp_path):
    """An interruption whose thread only records that it would end the process."""
    seen: list[tuple[int, str]] = []
    done = threading.Event()

    def end(self, status, text):
        seen.append((status, text))
        done.set()

    monkeypatch.setattr(Interruption, "end", end)
    return seen, done


@pytest.mark.fault(
    "signals",
    "SIGTERM with `--grace`, while a device program takes longer",
    "at the end of the grace period the run ends with status 143 and names the last checkpoint",
)
def test_the_grace_period_ends_a_step_that_does_not(ends, tmp_path):
    seen, done = ends
    interruption = Interruption(tmp_path, lambda text: None, lambda: 40, grace=0.1, doing="step 41 of the training")
    with attended(interruption):
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(5)
    ((status, text),) = seen
    assert status == 143
    assert text == (
        "stopped: step 41 of the training did not end within 0.1 s; the last good checkpoint is step 40; go on with: "
        f"jaxrl train --resume {tmp_path}"
    )


@pytest.mark.fault(
    "signals",
    "SIGTERM with `--grace`, in a step whose expected time exceeds half of it",
    "the step is aborted before its next program or host call, and the state before it is saved",
)
def test_a_step_that_would_outlast_half_of_the_grace_period_is_given_up(tmp_path):
    for grace, given_up in ((None, False), (1000.0, False), (10.0, True)):
        interruption = Interruption(tmp_path, lambda text: None, lambda: 40, grace=grace)
        interruption._steps, interruption._mark = [60.0] * 3, time.monotonic()
        interruption.give_up_the_step()  # no signal was sent
        interruption.handle(signal.SIGTERM, None)
        with pytest.raises(Abandoned) if given_up else contextlib.nullcontext():
            interruption.give_up_the_step()


def test_a_step_of_several_programs_is_given_up_between_them_and_keeps_its_state(make_bigram):
    """The state is kept until the last program, to which it is donated."""
    rows, calls = Rollout(samples_per_prompt=2, max_completion_tokens=2, eos_ids=(), pad_id=0), []
    step = make_train_step(
        make_bigram(6),
        optax.sgd(0.1),
        source=rows,
        rewards=[lambda completions: [float(len(text)) for text in completions]],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate],
        resources=Resources(decode=lambda ids: "a" * int(ids[0])),
    )
    number = jnp.arange(2)
    prompts = Prompts(number[:, None], number * 0 + 1, number, number[:, None] * 0, number * 0)
    state, items = step.init(jax.random.key(0)), [{}, {}]
    assert len(step.segments) > 2
    for most in range(len(step.segments)):

        def stop(most=most):
            calls.append(most)
            if calls.count(most) > most:
                raise Abandoned

        with pytest.raises(Abandoned):
            step.run(state, prompts, items, stop=stop)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    step.run(state, prompts, items, stop=lambda: None)


@pytest.mark.fault(
    "signals",
    "SIGTERM during an evaluation before or after the steps",
    "it is aborted between two batches; `--resume` repeats it",
)
def test_an_evaluation_is_given_up_between_its_batches(micro_yaml, tmp_path):
    def write_and_ask(records):
        os.kill(os.getpid(), signal.SIGTERM)

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("jaxrl_llm.run.measured.fresh_records", lambda path: write_and_ask)
        status = cli.main(["train", str(micro_yaml), f"run_dir={tmp_path / 'run'}", "warm_start.steps=0"])
    assert (status, err.getvalue().count("\n")) == (143, 1)
    assert err.getvalue() == f"stopped; no checkpoint yet; begin anew with: jaxrl train --resume {tmp_path / 'run'}\n"


@pytest.mark.fault(
    "signals",
    "a step takes `faults.stalled_after_medians` times the median",
    "status 75; `RUN/stalled.txt` has the stack of every thread",
)
def test_the_watchdog_ends_a_run_that_stands_still(ends, tmp_path):
    seen, done = ends
    named = {"brought": lambda file: f"s3://bucket/run/{file.name}"}
    interruption = Interruption(tmp_path, lambda text: None, lambda: None, stalled_after=3, least=0.05, **named)
    with attended(interruption):
        interruption.busy("evaluation before")
        time.sleep(0.4)
        assert not seen, "an evaluation may take as long as it takes"
        for step in range(5):
            interruption.step_done(f"step {step} of the training")
            time.sleep(0.005)
        assert done.wait(5)
    ((status, text),) = seen
    assert status == 75
    assert text.startswith("error: step 4 of the training has taken 0 s, where a step takes ")
    assert "where every thread is was written to s3://bucket/run/stalled.txt" in text
    assert "test_the_watchdog_ends_a_run" in (tmp_path / "stalled.txt").read_text()


ENDING = """
import sys, time
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def ending(completions):
    calls = int(CALLS.read_text()) if CALLS.exists() else 0
    CALLS.write_text(str(calls + 1))
    if calls == 3:  # the first call is the trial on one row
        {what}
    return [text.count("1") for text in completions]
"""


@pytest.fixture
def ending(tmp_path, monkeypatch):
    """(behaviour of a reward in the third step) -> overrides of a run with that reward."""

    def written(what: str) -> list[str]:
        name = f"ending_{abs(hash(what))}"
        (tmp_path / f"{name}.py").write_text(ENDING.replace("{what}", what))
        monkeypatch.syspath_prepend(tmp_path)
        return [*SHORT, f"run_dir={tmp_path / 'run'}", f"rewards=[{{python: '{name}:ending', OPTIONS}}]"]

    return written


@pytest.mark.fault(
    "functions", "a reward calls `sys.exit`, without `value_on_failure`", "status 1, the state before the step is saved"
)
@pytest.mark.slow
def test_a_reward_that_exits_ends_the_run_with_its_state_saved(micro_yaml, tmp_path, ending, capsys):
    words = [word.replace(", OPTIONS", "") for word in ending("sys.exit(0)")]
    said = refused(capsys, "train", str(micro_yaml), *words, status=1)
    assert "reward 'ending' raised FunctionEnded: SystemExit(0) on the batch as a whole" in said
    assert f"its traceback and output are in {tmp_path / 'run' / 'logs' / 'ending.log'}" in said
    assert "; the last good checkpoint is step 2; go on with: jaxrl train --resume" in said
    assert checkpoints.latest_step(tmp_path / "run" / "checkpoints") == 2
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert [line["step"] for line in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_failures_are_counted_and_too_many_end_the_run(micro_yaml, tmp_path, ending, capsys):
    words = [word.replace("OPTIONS", "deadline_s: 1, value_on_failure: 0.0") for word in ending("time.sleep(30)")]
    said = refused(capsys, "train", str(micro_yaml), *words, status=1)
    assert "failed for 16 of 16 rows, more than the share of 0.5 that faults.most_failed_share allows" in said
    (tmp_path / "calls").unlink()
    shutil.rmtree(tmp_path / "run")
    assert cli.main(["train", str(micro_yaml), *words, "faults.most_failed_share=1"]) == 0
    lines = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [line["failures/ending"] for line in lines] == [0, 0, 0, 16]


@pytest.mark.fault(
    "signals",
    "SIGTERM with `--grace`, while a user's function hangs",
    "the call is abandoned, the state before the step is saved, status 143",
)
@pytest.mark.slow
def test_a_stop_that_cannot_wait_gives_the_step_up(micro_yaml, tmp_path, ending, capsys):
    words = [word.replace(", OPTIONS", "") for word in ending("os.kill(os.getppid(), 15) or time.sleep(60)")]
    source = next(tmp_path.glob("ending_*.py"))
    source.write_text("import os\n" + source.read_text())
    assert cli.main(["train", str(micro_yaml), *words, "--grace", "6"]) == 143
    said = capsys.readouterr().err
    assert said == f"stopped at step 2; go on with: jaxrl train --resume {tmp_path / 'run'}\n"
    assert checkpoints.latest_step(tmp_path / "run" / "checkpoints") == 2


# ---- output ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("signals", "the reader of standard output closes the pipe", "`jaxrl train` continues without output")
@pytest.mark.slow
def test_a_run_whose_output_closes_goes_on_in_silence(micro_yaml, tmp_path):
    read, write = os.pipe()
    os.close(read)
    closed = open(write, "w")  # noqa: SIM115
    with contextlib.redirect_stdout(closed), contextlib.redirect_stderr(closed):
        assert cli.main(["train", str(micro_yaml), f"run_dir={tmp_path / 'run'}", *SHORT, "--json"]) == 0
    with contextlib.suppress(BrokenPipeError):
        closed.close()
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_lasting_stream_takes_everything():
    assert Lasting(None).write("abc") == 3
    stream = Lasting(io.StringIO())
    stream.write("a")
    assert stream.getvalue() == "a"
    stream.stream.close()
    stream.write("b")
    stream.flush()


def test_a_closed_pipe_has_a_status_of_its_own(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    replaced: list[int] = []
    monkeypatch.setattr(os, "dup2", lambda old, new: replaced.append(new))  # keeps the output of the tests
    with contextlib.suppress(BrokenPipeError), open(write, "w") as closed, contextlib.redirect_stdout(closed):
        assert cli.main(["tasks", "--json"]) == 141
    assert replaced == [1]


def test_a_closed_pipe_behind_rich_has_the_same_status(monkeypatch):
    def show(options):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 (as rich's console does)

    monkeypatch.setattr(os, "dup2", lambda old, new: None)
    monkeypatch.setattr("jaxrl_llm.commands.inventory.show_tasks", show)
    assert cli.main(["tasks"]) == 141


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(monkeypatch, capsys):
    def show(options):
        def collected(phase, info):
            gc.callbacks.remove(collected)
            raise KeyboardInterrupt

        gc.callbacks.append(collected)
        gc.collect()
        time.sleep(60)

    monkeypatch.setattr("jaxrl_llm.commands.inventory.show_tasks", show)
    began = time.monotonic()
    assert cli.main(["tasks"]) == 130
    assert time.monotonic() - began < 30  # what it waits for has ended, too
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.slow
@pytest.mark.fault(
    "signals", "the reader closes the pipe while a table is printed", "the command ends without a message, status 141"
)
def test_a_table_that_nobody_reads_ends_without_a_word():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_llm", "tasks", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, status",
    [
        pytest.param(
            errno.ENOSPC,
            1,
            id="ENOSPC",
            marks=pytest.mark.fault("storage", "the disk is full", "one sentence with the last checkpoint, status 1"),
        ),
        pytest.param(
            errno.EIO,
            75,
            id="EIO",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault("storage", "the disk fails (EIO)", "the same, with status 75 (restartable)"),
            ],
        ),
    ],
)
def test_a_disk_that_fails_is_one_sentence_with_the_way_on(micro_yaml, tmp_path, monkeypatch, capsys, number, status):
    def write_until(self, step, metrics):
        if step == 3:
            raise OSError(number, os.strerror(number), str(self.path / "metrics.jsonl"))
        write(self, step, metrics)

    write = RunDirectory.write_metrics
    monkeypatch.setattr(RunDirectory, "write_metrics", write_until)
    said = refused(capsys, "train", str(micro_yaml), f"run_dir={tmp_path / 'run'}", *EARLY, status=status)
    assert ("metrics.jsonl: the disk is full" if status == 1 else "Input/output error") in said
    assert f"the last good checkpoint is step 2; go on with: jaxrl train --resume {tmp_path / 'run'}" in said


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(
            "moved",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault(
                    "storage",
                    "the run directory is moved",
                    "status 1; the message says to move it back and to continue with `--resume`",
                ),
            ],
        ),
        pytest.param(
            "deleted",
            marks=[pytest.mark.slow, pytest.mark.fault("storage", "the run directory is deleted", "the same")],
        ),
    ],
)
def test_a_run_directory_that_is_gone_is_one_sentence(micro_yaml, tmp_path, monkeypatch, capsys, happens):
    run = tmp_path / "run"

    def write_and_lose(self, step, metrics):
        write(self, step, metrics)
        if step == 2:
            self.sync()
            run.rename(tmp_path / "elsewhere") if happens == "moved" else shutil.rmtree(run, ignore_errors=True)

    write = RunDirectory.write_metrics
    monkeypatch.setattr(RunDirectory, "write_metrics", write_and_lose)
    said = refused(capsys, "train", str(micro_yaml), f"run_dir={run}", *EARLY, status=1)
    assert f"run {run} cannot be written: {run}" in said  # its records, or a checkpoint that is being written
    assert f"it was moved or deleted; put it back, and go on with: jaxrl train --resume {run}" in said


DISKS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "it was moved or deleted",
    errno.EACCES: "it may not be written",
    errno.EMFILE: "too many files are open",
    errno.EIO: None,
    errno.ESTALE: None,
}


@pytest.mark.fault(
    "storage",
    "quota used up, read-only, no permission, too many open files, a stale handle",
    "the message names the cause; status 75 if it may be temporary, else 1",
)
@pytest.mark.parametrize("number", DISKS, ids=errno.errorcode.get)
def test_what_is_the_matter_with_a_disk_is_said(tmp_path, number):
    clause = DISKS[number]
    expected = failures.PassingError if clause is None else failures.StorageError
    with (
        pytest.raises(expected, match=f"{re.escape(clause or os.strerror(number))}.*; go on$"),
        failures.named(tmp_path, lambda: "go on"),
    ):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))


def test_a_disk_of_something_else_is_not_that_of_the_run(tmp_path):
    with pytest.raises(FileNotFoundError), failures.named(tmp_path / "run", lambda: "go on"):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "data.jsonl"))


class JaxRuntimeError(RuntimeError):
    """With the signature of jax's function."""


@pytest.mark.fault(
    "storage", "`UNAVAILABLE`, `INTERNAL`, `DATA_LOSS` of a device or of storage", "status 75: the run may be restarted"
)
@pytest.mark.parametrize(
    "error, passes, clause",
    [
        (JaxRuntimeError("UNAVAILABLE: socket closed"), True, None),
        (JaxRuntimeError("INTERNAL: device halted"), True, None),
        (JaxRuntimeError("DATA_LOSS: parity"), True, None),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False, None),
        (JaxRuntimeError("INVALID_ARGUMENT: shapes"), False, None),
        (ValueError("UNAVAILABLE: gs://bucket: connection reset"), True, None),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space [os_error_code='28']"), False, "the disk is full"),
        (ValueError("DATA_LOSS: Error reading: [os_error_code='5']"), True, None),
        (ValueError("DATA_LOSS: manifest: CRC does not match"), False, None),
        (ValueError("UNAVAILABLE is what the policy wrote"), False, None),
        (ValueError("path cannot be read: No such file or directory"), False, None),
        (ValueError("k is 3"), False, None),
        (RuntimeError("INTERNAL: of somebody else"), False, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_faults_are_told_apart(error, passes, clause):
    assert failures.passing(error) == passes
    assert failures.storage_fault(error) == clause


@pytest.mark.fault(
    "functions",
    "a reward, a grader, an engine or an environment in Python fails, also in an evaluation before the first step",
    "status 1, one sentence with the cause, the last good checkpoint and the command to continue",
)
@pytest.mark.parametrize("kind", [RewardError, EnvironmentFailure, EndpointError, GraderError])
def test_what_fails_outside_of_a_step_comes_with_the_way_on_too(tmp_path, capsys, kind):
    for opened, saved, way_on in (
        (False, None, ""),  # before the run has begun there is nothing to continue
        (True, None, f"; no checkpoint yet; begin anew with: jaxrl train --resume {tmp_path}"),
        (True, 70, f"; the last good checkpoint is step 70; go on with: jaxrl train --resume {tmp_path}"),
    ):
        (tmp_path / "config.yaml").touch()
        interruption = Interruption(tmp_path, print, lambda saved=saved: saved, opened=opened)
        with pytest.raises(kind) as caught, failures.continued(interruption):
            raise kind("the game server is down")
        assert str(caught.value) == f"the game server is down{way_on}"
        options = argparse.Namespace(traceback=False)
        assert cli._foreseen(caught.value, options) == (1, str(caught.value))
    assert capsys.readouterr().err.count("\n") == 3


def test_only_the_main_process_misses_the_config_of_a_run(tmp_path, monkeypatch):
    interruption = Interruption(tmp_path, print, lambda: 3, opened=True)
    assert interruption.way_on().startswith("put it back, and go on with: ")
    monkeypatch.setattr("jaxrl_llm.parallel.hosts.is_main", lambda: False)
    assert interruption.way_on().startswith("the last good checkpoint is step 3; go on with: ")


def test_the_first_cause_of_a_chain_is_named(tmp_path):
    def close():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))
        finally:
            raise RuntimeError("while closing")

    with (
        pytest.raises(failures.StorageError, match=r"metrics\.jsonl: the disk is full; go on$"),
        failures.named(tmp_path, lambda: "go on"),
    ):
        close()


@pytest.mark.fault("storage", "the name of a path is too long", "refused in one sentence, status 2")
@pytest.mark.parametrize("command", ["train", "export"])
def test_a_path_that_is_too_long_is_one_sentence(finished_run, micro_yaml, tmp_path, capsys, command):
    name = str(tmp_path / ("n" * 300))
    words = [str(micro_yaml), f"run_dir={name}"] if command == "train" else [str(finished_run.directory), name]
    said = refused(capsys, command, *words)
    assert "too long" in said
    assert len(said) < 700


def test_export_asks_for_its_package_before_it_reads_the_run(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("jaxrl_llm.commands.model_files.restored_run", None)
    said = refused(capsys, "export", str(finished_run.directory), str(tmp_path / "out"))
    assert "needs the package safetensors, which is not installed: pip install 'jaxrl_llm[hf]'" in said


# ---- numbers --------------------------------------------------------------------------------------------------------

BREAKING = """
import jax.numpy as jnp
from jaxrl_llm.losses import Loss

def breaking(logprobs, mask, weight, group, *, broken_group: int = 1, in_gradient: bool = True):
    counted = mask * weight[:, None]
    broken = (group == broken_group)[:, None] & (weight > 0)[:, None]
    spoiled = logprobs * jnp.where(broken, jnp.nan, -1.0) if in_gradient else jnp.where(broken, jnp.nan, -logprobs)
    return Loss((jnp.where(counted > 0, spoiled, 0.0)).sum(), counted.sum())
"""


@pytest.fixture
def breaking(tmp_path, monkeypatch, micro_yaml):
    (tmp_path / "breaking_loss.py").write_text(BREAKING)
    monkeypatch.syspath_prepend(tmp_path)
    words = [word for word in SHORT if not word.startswith("losses")]
    words += ["losses=[{python: 'breaking_loss:breaking'}, clipped_surrogate]", "training.minibatches_per_epoch=1"]
    return ["train", str(micro_yaml), f"run_dir={tmp_path / 'run'}", *words]


@pytest.mark.fault(
    "numbers",
    "gradients that are not finite, one after the other",
    "more than `faults.most_skipped_updates` end the run, status 1; the batch is in `RUN/failed/` for `jaxrl replay`",
)
@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_too_many_end_the_run(breaking, tmp_path, capsys):
    said = refused(capsys, *breaking, "faults.most_skipped_updates=2", status=1)
    assert said.startswith("error: loss/breaking is nan, although every field of the rows is finite")
    assert "3 updates were skipped one after the other. The last good checkpoint is step 0" in said
    assert f"init_from={tmp_path / 'run'} and another run_dir" in said
    lines = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_update"] for line in lines] == [1.0, 1.0]
    assert all("loss/breaking" not in line for line in lines)
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [0]
    file = tmp_path / "run" / "failed" / "step_000002.npz"
    assert str(file) in said or file.is_file()
    assert cli.main(["replay", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["stage"], found["policy of checkpoint"]) == (2, "reinforcement", 0)
    assert [entry["not finite"][:1] for entry in found["groups"]] == [[], ["loss/breaking"], [], []]
    assert found["groups"][1]["rows"] == [4, 5, 6, 7]
    assert cli.main(["replay", str(file)]) == 0
    assert "with the policy of checkpoint 0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "in_gradient",
    [
        pytest.param(
            True,
            marks=[
                pytest.mark.slow,  # tests/run/test_optimizers.py has a fast test
                pytest.mark.fault(
                    "numbers", "a gradient that is not finite", "the update is skipped, counted, and changes nothing"
                ),
            ],
        ),
        pytest.param(
            False,
            marks=[
                pytest.mark.slow,
                pytest.mark.fault("numbers", "a loss that is not finite, its gradient being so", "the same"),
            ],
        ),
    ],
)
def test_a_few_skipped_updates_are_counted_and_change_nothing(in_gradient, breaking, tmp_path, capsys):
    words = [word.replace("breaking'}", f"breaking', in_gradient: {str(in_gradient).lower()}}}") for word in breaking]
    assert cli.main([*words, "training.steps=2", "faults.most_skipped_updates=2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "loss/breaking is nan" in shown
    assert "The update was skipped (1 of 2 that may follow one another)" in shown
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_updates"] == 2
    norms = [line["parameter_norm"] for line in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None], ids=["empty", "cut", "missing"])
def test_what_is_no_failed_batch_is_refused(tmp_path, capsys, content):
    file = tmp_path / "step.npz"
    if content is not None:
        file.write_bytes(content)
    assert "give a file of RUN/failed" in refused(capsys, "replay", str(file))


# metrics of steps -> message, and its step.
RUNS = {
    "divergence": ([{"kl_reference_per_token": 0.1}] * 10 + [{"kl_reference_per_token": 2.0}] * 10, "far from its", 13),
    "entropy": ([{"entropy_per_token": 1.0}] * 10 + [{"entropy_per_token": 0.01}] * 20, "entropy has collapsed", 20),
    "length": ([{"completion_tokens": 10.0}] * 10 + [{"completion_tokens": 50.0}] * 10, "have grown from 10", 15),
    "cut": ([{"truncated_share": 0.8}] * 12, "80% of the completions are truncated", 10),
    "turns": (
        [{"truncated_share": 0.9, "episode/stopped_by_turn_limit": 0.9, "episode/stopped_by_token_limit": 0.0}] * 12,
        "cut off before they are over: 90% at the environment's limit on turns",
        10,
    ),
    "two limits": (
        [{"truncated_share": 0.6, "episode/stopped_by_turn_limit": 0.2, "episode/stopped_by_token_limit": 0.4}] * 12,
        "20% at the environment's limit on turns and 40% at max_completion_tokens",
        10,
    ),
    "gap": ([{"sampler_gap_mean": 0.3}] * 12, "sampler and trainer disagree", 10),
    "constant": ([{"constant_group_share": 1.0}] * 12, "they give no gradient", 10),
    "hacking": (
        [{"reward": r, **({} if p is None else {"validation/pass@1": p})} for r, p in
         [(0.1, 0.5), (0.3, None), (0.6, 0.4), (0.9, None), (1.0, 0.3), (1.0, None)]],
        "may be exploiting the reward",
        5,
    ),
    "silent": (
        [{"reward/format_std": 0.0, "reward/right_std": 0.1}] * 25,
        "every completion of 20 steps, or applied to none: format;",
        20,
    ),
    "never applies": ([{"reward/rare_applies": 0.0, "reward/right_std": 0.1}] * 25, "applied to none: rare;", 20),
    "verifier": (
        [{"reward": 0.01 * n, "correct_share": 0.5 - 0.01 * max(0, n - 20)} for n in range(40)],
        "while correct_share (completions accepted by the first reward) has fallen (50.0% to 44.5%)",
        31,
    ),
    "good": ([{"reward": 0.1 * n, "entropy_per_token": 1.0, "constant_group_share": 0.9} for n in range(30)], None, 0),
}  # fmt: skip


def test_what_is_not_defined_is_no_fault():
    nan = float("nan")
    absent = {"starc/a": nan, "reward_correlation/a/length": nan, "source/b/reward": nan, "metric/mine": nan}
    assert undefined({**absent, "reward": nan, "my_own": nan, "reward/a": 0.5}) == absent.keys()
    assert not_finite({**absent, "loss": nan, "reward/a": float("inf")}) == ["loss", "reward/a"]


@pytest.mark.fault(
    "numbers",
    "divergence, entropy, length, cut completions, log-probability gap, constant rewards, reward hacking",
    "an alarm, printed once while its condition holds; the run continues",
)
@pytest.mark.parametrize("kind", RUNS)
def test_alarms_ring_once(kind):
    steps, said, at = RUNS[kind]
    alarms = Alarms()
    heard = [(number, text) for number, metrics in enumerate(steps, 1) for text in alarms.new(metrics)]
    assert len(heard) == (said is not None)
    if said is not None:
        assert heard[0][0] == at
        assert said in heard[0][1]
