"""The run directory: what is written, what resuming takes back, and what is refused."""

from __future__ import annotations

import json
import math
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tensorboardX.proto import event_pb2

from jaxrl_llm.reporting.run_directory import RunDirectory, read_records, truncate_records, write_summary

CONFIG = {"name": "demo", "training": {"learning_rate": np.float32(1e-6), "steps": 6}, "rewards": ("exact_answer",)}


def metrics_of(step):
    return {"loss": jnp.float32(0.1 * step), "reward": np.float32(step / 7), "stage": "rl"}


def run_steps(run, first, last):
    for step in range(first, last + 1):
        run.write_metrics(step, metrics_of(step))
        if step % 2 == 0:
            run.write_samples(step, [{"prompt": "1+1=", "completion": "2", "reward": np.float32(1)}] * 2)


def test_files_of_a_run(tmp_path):
    with RunDirectory(tmp_path / "a" / "run", CONFIG) as run:
        run_steps(run, 1, 3)
        run.write_summary({"pass@1": np.float32(0.3), "by_k": {4: jnp.array([0.5, 0.25])}})
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {
        "name": "demo",
        "training": {"learning_rate": 1e-06, "steps": 6},
        "rewards": ["exact_answer"],
    }
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "loss": 0.1, "reward": 0.14285715, "stage": "rl"}'
    assert [record["step"] for record in read_records(run.path / "metrics.jsonl")] == [1, 2, 3]
    assert (
        read_records(run.path / "samples.jsonl")
        == [{"step": 2, "prompt": "1+1=", "completion": "2", "reward": 1.0}] * 2
    )
    assert json.loads((run.path / "summary.json").read_text()) == {"pass@1": 0.3, "by_k": {"4": [0.5, 0.25]}}


def test_a_line_is_on_file_as_soon_as_it_is_written(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.write_metrics(1, {"loss": 1.0})
    assert read_records(run.path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    run.sync()
    run.close()
    run.close()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.bool_])
def test_scalars_of_every_type_keep_their_value(tmp_path, dtype):
    value = jnp.asarray(0.7, dtype)
    with RunDirectory(tmp_path / "run", {}) as run:
        run.write_metrics(1, {"value": value, "numpy": np.asarray(value)[()]})
    record = read_records(run.path / "metrics.jsonl")[0]
    assert jnp.asarray(record["value"], dtype) == value
    assert record["numpy"] == record["value"]


def test_numbers_that_are_not_finite_stay_visible(tmp_path):
    with RunDirectory(tmp_path / "run", {}) as run:
        run.write_metrics(1, {"nan": jnp.float32(jnp.nan), "inf": -np.float32(np.inf)})
    record = read_records(run.path / "metrics.jsonl")[0]
    assert math.isnan(record["nan"])
    assert record["inf"] == -math.inf


@pytest.mark.parametrize("killed_at", [3, 4, 5, 6])
def test_a_killed_and_resumed_run_leaves_the_same_lines(tmp_path, killed_at):
    """The checkpoint is of step 3; the run dies in the middle of a line of any later step."""
    with RunDirectory(tmp_path / "whole", CONFIG) as whole:
        run_steps(whole, 1, 6)
    killed = RunDirectory(tmp_path / "killed", CONFIG)
    run_steps(killed, 1, killed_at)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (killed.path / name).open("a") as file:
            file.write('{"step": 1')  # cut short of "step": 17, and of its line end
    killed.close()
    with RunDirectory(tmp_path / "killed", CONFIG, resume_step=3) as resumed:
        run_steps(resumed, 4, 6)
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def event_scalars(folder):
    """(step, name, value) that TensorBoard would show: a session that starts at a step hides what came before it."""
    shown = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            # A record: length (8 bytes), checksum (4), the event, checksum (4).
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                shown = [entry for entry in shown if entry[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


def test_tensorboard_shows_each_step_once_after_resuming(tmp_path):
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        run_steps(run, 1, 5)
    with RunDirectory(tmp_path / "run", CONFIG, resume_step=3) as run:
        run_steps(run, 4, 6)
    scalars = event_scalars(run.path / "tensorboard")
    assert {name for _, name, _ in scalars} == {"loss", "reward"}
    losses = [(step, value) for step, name, value in scalars if name == "loss"]
    np.testing.assert_allclose(losses, [(step, 0.1 * step) for step in range(1, 7)], rtol=1e-6)


def test_records_out_of_order_are_taken_back_by_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 4}\n{"step": 2}\n{"step": 5}')
    assert truncate_records(path, 2) == 1
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert truncate_records(tmp_path / "absent.jsonl", 2) == 0
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("line", ["{broken", '{"loss": 1}', "[1]", "3", '{"step": "one"}'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        truncate_records(path, 2)
    assert len(path.read_text().splitlines()) == 3


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path):
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        run.write_metrics(1, {"loss": 1.0})
    before = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"not empty \(it has config\.yaml, metrics\.jsonl.*resume the existing run"):
        RunDirectory(tmp_path / "run", CONFIG)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty", CONFIG).close()


def test_other_bad_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        RunDirectory(tmp_path / "run", CONFIG, resume_step=3)
    with pytest.raises(ValueError, match="gs://bucket/run"):
        RunDirectory("gs://bucket/run", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "file", CONFIG)


def test_bad_values_are_refused_by_name_before_anything_is_written(tmp_path):
    with RunDirectory(tmp_path / "run", {}) as run:
        with pytest.raises(ValueError, match="nested: inner: a value of type object"):
            run.write_metrics(1, {"nested": {"inner": object()}})
        with pytest.raises(ValueError, match="'step' is among"):
            run.write_metrics(1, {"step": 2})
        assert read_records(run.path / "metrics.jsonl") == []


def test_summary_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_summary(tmp_path, {"pass@1": 0.25})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_summary(tmp_path, {"pass@1": 0.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"pass@1": 0.25}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
