"""Whole runs: their output, bit-identical numbers after a kill, and refused and failing runs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

import jaxrl_llm
from jaxrl_llm import cli
from jaxrl_llm.config import load_config
from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.reporting.run_directory import read_records
from jaxrl_llm.run import checkpoints
from jaxrl_llm.run.digests import text_digest
from jaxrl_llm.run.integrity import latest_checkpoint
from jaxrl_llm.run.stages import spread

# The tests read checkpoints without their original shardings.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

WARM, STEPS = 10, 8


def records(directory, name="metrics.jsonl"):
    return [{k: v for k, v in one.items() if k not in OF_MACHINE} for one in read_records(directory / name)]


def stored_state(directory: Path, step: int):
    """All arrays of a checkpoint, read without the code of the package."""
    with ocp.PyTreeCheckpointer() as reader:
        state = reader.restore(directory / "checkpoints" / str(step) / "state")
    state["key"] = jax.random.key_data(state["key"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


# ---- the output of a run --------------------------------------------------------------------------------------------


def test_the_config_is_written_as_it_was_used(finished_run, micro_yaml):
    used = load_config(micro_yaml, [f"run_dir={finished_run.directory}"], vocabulary_size=100)
    assert load_config(finished_run.directory / "config.yaml") == used


def test_metrics_are_one_line_a_step_of_finite_numbers(finished_run):
    lines = records(finished_run.directory)
    assert [line["step"] for line in lines] == list(range(1, WARM + STEPS + 1))
    assert [line["stage"] for line in lines] == ["warm start"] * WARM + ["reinforcement"] * STEPS
    for line in lines:
        assert all(math.isfinite(value) for name, value in line.items() if name != "stage")
    assert lines[WARM - 1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines if "validation/pass@1" in line] == [5, 10, WARM + 3, WARM + 6]
    assert all(line["sampler_gap_max"] < 1e-5 for line in lines[WARM:])


def test_what_one_looks_for_in_the_metrics_is_there(finished_run):
    lines = read_records(finished_run.directory / "metrics.jsonl")
    for line in lines[WARM:]:
        # Right answers have twice the weight of the format.
        assert line["reward"] == pytest.approx(line["reward/answer_format"] + 2 * line["reward/exact_answer"], abs=1e-6)
        assert line["reward/exact_answer_applies"] == 1
        assert line["reward/exact_answer_std"] >= 0
        assert line["reward_std"] >= 0
        assert line["tokens_per_second"] == pytest.approx(16 * line["completion_tokens"] / line["seconds"])
        assert line["learning_rate"] == pytest.approx(0.003)
        assert 0.05 < line["host_memory_gib"] < 1000
    warm = [line["learning_rate"] for line in lines[:WARM]]
    assert warm == pytest.approx([0.0, 0.01, *[0.02] * 8])
    assert "answer_format ≥ 1" in finished_run.shown
    assert re.search(r"warm start 5/10  validation: pass@1 [\d.]+%\n", finished_run.shown)
    assert re.search(r"reinforcement 3/8  validation: greedy [\d.]+%, pass@1 [\d.]+%, pass@2 ", finished_run.shown)


def test_samples_are_text_with_its_rewards(finished_run):
    lines = records(finished_run.directory, "samples.jsonl")
    assert [line["step"] for line in lines] == [11, 11, 13, 13, 16, 16, 18, 18]
    for line in lines:
        assert line["prompt"].startswith("A:")
        assert sum(map(int, line["prompt"][2:].split("+"))) == int(line["answer"])
        assert line["reward"] == line["rewards"]["answer_format"] + 2 * line["rewards"]["exact_answer"]
        assert line["correct"] == (line["rewards"]["answer_format"] >= 1)  # the first reward
        assert "<eos>" not in line["completion"]


def test_tensorboard_events_are_there(finished_run):
    (events,) = (finished_run.directory / "tensorboard").iterdir()
    assert b"kl_reference_per_token" in events.read_bytes()


def test_the_newest_checkpoints_are_kept(finished_run):
    kept = sorted(int(path.name) for path in (finished_run.directory / "checkpoints").iterdir())
    assert kept == [14, 16, 18]


def test_the_summary_says_what_came_out_and_of_what(finished_run):
    summary = finished_run.summary
    assert json.loads((finished_run.directory / "summary.json").read_text()) == summary
    for side in (summary["before"], summary["after"]):
        assert {"greedy", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"} <= side.keys()
        assert all(0 <= side[name] <= 1 for name in side if "@" in name or name == "greedy")
        assert side["pass@1"] <= side["pass@2"] <= side["pass@4"]
        assert (side["problems"], side["samples_per_problem"]) == (12, 4)
    tokens = [round(16 * line["completion_tokens"]) for line in records(finished_run.directory)[WARM:]]
    assert summary["completion_tokens_sampled"] == sum(tokens)
    assert (summary["warm_start_steps"], summary["steps"]) == (WARM, STEPS)
    assert summary["peak_memory_bytes"] > 2**20
    assert summary["versions"]["jax"] == jax.__version__
    assert re.fullmatch("[0-9a-f]{16}", summary["config_hash"])
    assert summary["data"].keys() == {"train", "validation", "test"}
    assert summary["compilations"] + summary["programs_read"] > 0


def test_every_second_is_counted_once(finished_run):
    seconds = dict(finished_run.summary["seconds"])
    total = seconds.pop("total")
    stages = {"set-up", "warm start", "evaluation before", "reinforcement", "evaluation during"}
    assert seconds.keys() == stages | {"evaluation after"}
    assert sum(seconds.values()) == pytest.approx(total)
    of_steps = sum(line["seconds"] for line in read_records(finished_run.directory / "metrics.jsonl"))
    assert of_steps < total < finished_run.seconds


def test_people_see_units_progress_and_the_result(finished_run):
    for text in ("sequences per step", "warm start 10/10", "reinforcement 8/8", "pass@4", "run directory"):
        assert text in finished_run.shown
    assert "compiled after warm-up" not in finished_run.shown


# ---- killed and resumed ---------------------------------------------------------------------------------------------

# `jaxrl` as a user starts it, but it is killed right after the metrics of a step were written.
DOOMED = """
import os, runpy, signal, sys
from jaxrl_llm.reporting import RunDirectory

last, write = int(sys.argv[1]), RunDirectory.write_metrics

def write_and_die(self, step, metrics):
    write(self, step, metrics)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)

RunDirectory.write_metrics = write_and_die
sys.argv = ["jaxrl", *sys.argv[2:]]
runpy.run_module("jaxrl_llm.cli", run_name="__main__")
"""


def killed_after(step: int, *arguments: str):
    return subprocess.run(
        [sys.executable, "-c", DOOMED, str(step), *arguments],
        cwd=Path(jaxrl_llm.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def interrupted_run(finished_run, micro_yaml, tmp_path_factory):
    """The same run as after a kill, with its newest checkpoint damaged, resumed with two more steps.

    What a kill leaves is what is on the disk: a copy of it, made while a checkpoint may be under way. The run itself is
    stopped by SIGTERM at the same step.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    directory, at = folder / "left", WARM + random.Random(20).randrange(3, 6)

    def write_copy_and_ask(self, step, metrics):
        write(self, step, metrics)
        if step == at:
            with contextlib.suppress(shutil.Error):  # of files that a thread removes meanwhile
                shutil.copytree(self.path, directory)
            os.kill(os.getpid(), signal.SIGTERM)

    write, out, err = RunDirectory.write_metrics, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(RunDirectory, "write_metrics", write_copy_and_ask)
        status = cli.main(["train", str(micro_yaml), f"run_dir={folder / 'run'}"])
    stopped = SimpleNamespace(directory=folder / "run", at=at, status=status, out=out.getvalue(), err=err.getvalue())
    damaged = checkpoints.latest_step(directory / "checkpoints")
    for path in (directory / "checkpoints" / str(damaged)).glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[:-20])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        refused = cli.main(["train", "--resume", str(directory), "--exact"])
        status = cli.main(["train", "--resume", str(directory), f"training.steps={STEPS + 2}"])
    told = dict(refused=(refused, err.getvalue()), shown=" ".join(out.getvalue().split()), status=status)
    return SimpleNamespace(directory=directory, stopped=stopped, damaged=damaged, **told)


@pytest.mark.fault("signals", "SIGTERM", "the run ends after its step with status 143, its state saved")
def test_a_terminated_run_stops(interrupted_run):
    ended = interrupted_run.stopped
    assert ended.status == 143, ended.err  # the status of a process that SIGTERM ended
    assert "stopping after this step" in ended.out
    stopped = re.search(r"stopped at step (\d+); go on with: jaxrl train --resume (\S+)", ended.err)
    assert stopped is not None, ended.err
    assert stopped[2] == str(ended.directory)
    # Metrics are read one step late, and the current step is finished.
    assert ended.at <= int(stopped[1]) <= ended.at + 2
    assert len(records(ended.directory)) == int(stopped[1])


@pytest.mark.slow
@pytest.mark.fault(
    "signals",
    "SIGKILL",
    "`--resume` continues from the last checkpoint, and every number equals that of an uninterrupted run",
)
def test_a_run_that_is_killed_is_that_of_one_that_was_not(finished_run, micro_yaml, tmp_path):
    run = tmp_path / "run"
    for step, words in (4, [str(micro_yaml), f"run_dir={run}"]), (WARM + 4, ["--resume", str(run)]):
        killed = killed_after(step, "train", *words)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert records(run) == records(finished_run.directory)
    expected, found = (stored_state(one, WARM + STEPS) for one in (finished_run.directory, run))
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name)


@pytest.mark.fault(
    "storage",
    "the newest checkpoint is damaged",
    "it is named and moved to `RUN/damaged/`; the run continues from the one before it with the same numbers",
)
def test_a_run_goes_on_from_the_newest_good_checkpoint(interrupted_run):
    status, said = interrupted_run.refused
    assert status == 2
    assert "--exact" in said
    assert f"checkpoint {interrupted_run.damaged} is damaged: it cannot be read" in interrupted_run.shown
    assert re.search(r"checkpoint \d+ is verified", interrupted_run.shown)
    moved = interrupted_run.directory / "damaged" / str(interrupted_run.damaged)
    assert f"damaged checkpoint moved to {moved}" in interrupted_run.shown
    assert moved.is_dir()


def test_every_number_of_a_resumed_run_is_that_of_one_that_was_never_stopped(finished_run, interrupted_run):
    assert interrupted_run.status == 0
    expected, found = records(finished_run.directory), records(interrupted_run.directory)
    assert found[: len(expected)] == expected
    # The other run has more steps, so that step 18 is not its last.
    samples = [one for one in records(finished_run.directory, "samples.jsonl") if one["step"] < WARM + STEPS]
    assert records(interrupted_run.directory, "samples.jsonl")[: len(samples)] == samples


def test_every_array_of_a_resumed_run_is_that_of_one_that_was_never_stopped(finished_run, interrupted_run):
    step = WARM + STEPS
    expected, found = (stored_state(run.directory, step) for run in (finished_run, interrupted_run))
    assert expected.keys() == found.keys()
    assert {"memory", "networks", "key", "step"} == {re.findall(r"\w+", name)[0] for name in expected}
    held = {tuple(re.findall(r"\w+", name)[:3]) for name in expected if "networks" in name}
    assert held == {("networks", *rest) for rest in [("policy", "params"), ("policy", "optimizer_state")]} | {
        ("networks", "reference", "params")
    }
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name)


def test_what_a_resumed_run_counts_goes_on(finished_run, interrupted_run):
    summary = json.loads((interrupted_run.directory / "summary.json").read_text())
    assert summary["before"] == finished_run.summary["before"]
    assert summary["warm_start_steps"] == WARM
    tokens = [round(16 * line["completion_tokens"]) for line in records(interrupted_run.directory)[WARM:]]
    assert summary["completion_tokens_sampled"] == sum(tokens)
    assert summary["seconds"]["warm start"] > 0


def test_steps_may_be_added_to_a_run(interrupted_run):
    assert [line["step"] for line in records(interrupted_run.directory)] == list(range(1, WARM + STEPS + 3))
    assert checkpoints.latest_step(interrupted_run.directory / "checkpoints") == WARM + STEPS + 2
    assert load_config(interrupted_run.directory / "config.yaml").training.steps == STEPS + 2


# ---- refused --------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: str, status: int = 2) -> str:
    """The message of `jaxrl` if it refuses its input (2), or fails during the run (1)."""
    assert cli.main(arguments) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def test_a_run_is_resumed_with_its_own_config_only(finished_run, capsys):
    before = (finished_run.directory / "metrics.jsonl").read_bytes()
    said = refused(capsys, "train", "--resume", str(finished_run.directory), "training.learning_rate=0.1")
    assert f"run {finished_run.directory} was started with another config: " in said
    assert "training.learning_rate (0.003, now 0.1); resume it with its own values" in said
    assert f"start a new run from its weights with init_from={finished_run.directory} and another run_dir" in said
    assert (finished_run.directory / "metrics.jsonl").read_bytes() == before


def test_a_run_is_resumed_with_its_own_data_only(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run.directory, tmp_path / "run")
    meta = tmp_path / "run" / "checkpoints" / "18" / "meta" / "metadata"
    changed = json.loads(meta.read_text())
    changed["data"]["train"] = "0123"
    del changed["digest"]
    changed["digest"] = text_digest(changed)
    meta.write_text(json.dumps(changed))
    said = refused(capsys, "train", "--resume", str(tmp_path / "run"))
    assert "was started with other files: train changed since (its data was {'train': '0123'" in said
    assert "restore them, or start a new run" in said


def test_a_directory_that_holds_a_run_is_not_written_over(finished_run, micro_yaml, capsys):
    said = refused(capsys, "train", str(micro_yaml), f"run_dir={finished_run.directory}")
    assert "is not empty" in said
    assert "resume the existing run, give another run_dir" in said


def test_hyper_parameters_that_cannot_work_are_found_before_anything_is_made(micro_yaml, tmp_path, capsys):
    override = "losses=[{clipped_surrogate: {clip_low: -1.0}}]"
    said = refused(capsys, "train", str(micro_yaml), f"run_dir={tmp_path / 'run'}", override)
    assert "clip_low" in said
    assert not (tmp_path / "run").exists()


# ---- failing during the run -----------------------------------------------------------------------------------------

# It is called in a separate process, so it counts in a file.
JUDGING = """
from pathlib import Path

COUNT = Path(__file__).with_name("calls")

def judge(completions):
    calls, good_calls = map(int, COUNT.read_text().split())
    COUNT.write_text(f"{calls + 1} {good_calls}")
    if calls >= good_calls:
        raise LookupError("no such case")
    return [text.count("1") for text in completions]
"""


@pytest.mark.slow
def test_a_reward_that_fails_costs_no_step(micro_yaml, tmp_path, monkeypatch, capsys):
    (tmp_path / "judging.py").write_text(JUDGING)
    calls = tmp_path / "calls"
    calls.write_text("0 3")  # once before compilation
    monkeypatch.syspath_prepend(tmp_path)
    directory = tmp_path / "run"
    changes = ["rewards=[{python: 'judging:judge'}]", "warm_start.steps=0", "losses=[clipped_surrogate]"]

    # The third step fails (the fourth call), while the checkpoint before it is being written.
    said = refused(capsys, "train", str(micro_yaml), f"run_dir={directory}", *changes, status=1)
    assert "reward 'judge' raised LookupError: no such case at row 0 (completion '" in said
    assert "; the last good checkpoint is step 2; go on with: jaxrl train --resume" in said
    assert checkpoints.latest_step(directory / "checkpoints") == 2
    assert [line["step"] for line in records(directory)] == [1, 2]

    # The fourth step fails with no checkpoint of the third.
    calls.write_text("0 2")
    assert "the last good checkpoint is step 3" in refused(capsys, "train", "--resume", str(directory), status=1)
    assert checkpoints.latest_step(directory / "checkpoints") == 3
    assert [line["step"] for line in records(directory)] == [1, 2, 3]

    calls.write_text("0 1000")
    assert cli.main(["train", "--resume", str(directory)]) == 0
    assert [line["step"] for line in records(directory)] == list(range(1, STEPS + 1))
    assert "reinforcement 8/8" in capsys.readouterr().out


@pytest.mark.fault(
    "numbers", "parameters that are not finite", "the run ends with status 1 and names the last checkpoint before them"
)
def test_a_number_that_is_not_finite_ends_the_run_before_a_checkpoint_is_spoiled(micro_yaml, tmp_path, capsys):
    directory = tmp_path / "run"
    changes = ["warm_start.learning_rate=1e30", "checkpoints.every_steps=1"]
    assert cli.main(["train", str(micro_yaml), f"run_dir={directory}", *changes]) == 1
    said = capsys.readouterr().err
    found = re.match(
        r"error: \S+ is (nan|inf).* at step (\d+) of the warm start; its batch is in .* The last good "
        r"checkpoint is step (\d+): start from it with init_from=(\S+) and another run_dir, and lower the .*\n$",
        said,
    )
    assert found is not None, said
    assert int(found[3]) == int(found[2]) - 1
    assert checkpoints.latest_step(Path(found[4]) / "checkpoints") == int(found[3])
    for name, array in stored_state(directory, int(found[3])).items():
        assert np.isfinite(array).all(), name


# ---- small parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "wanted", "expected"), [(5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (4, 1, [0])]
)
def test_problems_are_spread_over_the_whole_set(count, wanted, expected):
    assert spread(count, wanted).tolist() == expected


def test_a_run_stands_for_its_newest_checkpoint(finished_run):
    folder = finished_run.directory / "checkpoints"
    assert latest_checkpoint(finished_run.directory) == (folder, 18)
    assert latest_checkpoint(folder) == (folder, 18)
    assert latest_checkpoint(folder / "14") == (folder, 14)


@pytest.mark.parametrize("name", ["", "nowhere", "17"])
def test_what_holds_no_checkpoint_is_refused(tmp_path, name):
    with pytest.raises(checkpoints.CheckpointError, match="holds no checkpoint; give a run directory"):
        latest_checkpoint(tmp_path / name)


def test_signals_are_given_back(finished_run):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_configs_that_decide_the_same_numbers_have_one_hash(finished_run, interrupted_run):
    found = yaml.safe_load((interrupted_run.directory / "summary.json").read_text())["config_hash"]
    assert found == finished_run.summary["config_hash"]
