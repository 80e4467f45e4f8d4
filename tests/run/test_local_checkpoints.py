"""Checkpoints on the hosts between those on the storage, and what a run's seconds were good for."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.reporting.run_directory import STARTS, read_records
from jaxrl_llm.run import checkpoints, stages
from jaxrl_llm.run.checkpoints import CheckpointError
from jaxrl_llm.run.goodput import goodput
from jaxrl_llm.run.local_checkpoints import local_checkpoints


def state(seed: int) -> dict:
    return {
        "weights": jax.random.normal(jax.random.key(seed), (3, 5)),
        "narrow": jnp.arange(4, dtype=jnp.bfloat16) + seed,
        "step": jnp.int32(seed),
        "key": jax.random.key(seed),
        "nothing": jnp.zeros((0, 2)),
    }


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def local(tmp_path, said):
    return local_checkpoints(str(tmp_path), "run", "config", None, said.append)


def equal(a, b) -> bool:
    bits = lambda leaf: np.asarray(jax.random.key_data(leaf) if leaf.dtype == a["key"].dtype else leaf)  # noqa: E731
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bits(x).tobytes() == bits(y).tobytes(), a, b)))


def test_a_state_comes_back_bit_for_bit_and_the_newest_two_are_kept(local):
    for step in (1, 2, 3):
        local.save(step, state(step), {"stage": "rl", "tokens": step})
    local.wait()
    assert local.steps() == [2, 3]
    assert local.agreed(newest=0) == 3
    assert local.agreed(newest=3) is None  # the storage has it
    assert equal(local.restore(3, state(0)), state(3))
    assert local.meta(3) == {"stage": "rl", "tokens": 3}
    with pytest.raises(CheckpointError, match="does not hold narrow"):
        local.restore(3, state(0) | {"narrow": jnp.zeros(4)})


@pytest.mark.parametrize("file, place", [("arrays", 7), ("arrays", -1), ("manifest.json", 40), ("manifest.json", -9)])
def test_what_is_damaged_is_not_gone_on_from(local, file, place):
    for step in (1, 2):
        local.save(step, state(step), {})
    local.wait()
    path = local.folder / "2" / file
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert local.agreed(newest=0) == 1


def test_those_of_another_run_another_config_or_another_mesh_are_not_taken(local, tmp_path, said):
    local.save(1, state(1), {})
    local.wait()
    for owner in (("run", "other config", None), ("run", "config", type("Mesh", (), {"shape": {"data": 2}}))):
        assert local_checkpoints(str(tmp_path), *owner, said.append).agreed(newest=0) is None
    assert local_checkpoints(str(tmp_path), "other run", "config", None, said.append).agreed(newest=0) is None
    local.close(finished=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_costs_no_more_than_the_checkpoint(local, said):
    local.folder.parent.parent.mkdir(exist_ok=True)
    local.folder.parent.write_text("a file where a directory should be")
    local.save(1, state(1), {})
    local.wait()
    assert "local checkpoint 1 was not written" in said[0]
    assert local.agreed(newest=0) is None


def test_useful_seconds_over_paid_seconds_of_all_starts(tmp_path):
    lines = [{"started": 1.0, "seconds": 10.0}, {"started": 1.0, "seconds": 70.0}, {"started": 99.0, "seconds": 30.0}]
    (tmp_path / STARTS).write_text("\n".join(json.dumps(line) for line in lines) + '\n{"started": 9')
    found = goodput(tmp_path, {"set-up": 20.0, "training": 50.0, "evaluation after": 5.0}, compiling=15.0)
    assert found == {"useful_seconds": 40.0, "paid_seconds": 100.0, "share": 0.4, "starts": 2}


def test_a_run_says_its_goodput(finished_run):
    found = finished_run.summary["goodput"]
    seconds = finished_run.summary["seconds"]
    assert found["starts"] == 1
    assert 0 < found["useful_seconds"] <= seconds["total"] - seconds["set-up"] + 0.001
    assert found["paid_seconds"] == pytest.approx(seconds["total"], rel=0.05)


@pytest.mark.slow
def test_a_run_goes_on_from_its_host_and_repeats_its_numbers(finished_run, micro_yaml, tmp_path, monkeypatch, capsys):
    run, written = tmp_path / "run", stages.write_samples

    def killed(run, step, *rest, **options):
        if step == 14:
            raise SystemExit("killed")
        written(run, step, *rest, **options)

    monkeypatch.setattr(stages, "write_samples", killed)
    local = ["checkpoints.every_steps=5", f"checkpoints.local_dir={tmp_path}/local"]
    with pytest.raises(SystemExit):
        cli.main(["train", str(micro_yaml), f"run_dir={run}", *local])
    assert checkpoints.latest_step(run / "checkpoints") == 10
    monkeypatch.setattr(stages, "write_samples", written)
    lost = shutil.copytree(run, tmp_path / "lost")
    assert cli.main(["train", "--resume", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "resuming from the local checkpoint of step 13; the run directory has step 10" in shown
    numbers = lambda run: [  # noqa: E731
        {k: v for k, v in line.items() if k not in OF_MACHINE} for line in read_records(run / "metrics.jsonl")
    ]
    assert numbers(run) == numbers(finished_run.directory)
    ends = [checkpoints.read_digests(where / "checkpoints", 18) for where in (run, finished_run.directory)]
    assert ends[0] == ends[1]
    assert json.loads((run / "summary.json").read_text())["goodput"]["starts"] == 2
    assert list((tmp_path / "local").iterdir()) == []
    # A host that was replaced has none: the storage's is taken, with the same numbers.
    assert cli.main(["train", "--resume", str(lost)]) == 0
    assert "local checkpoint" not in capsys.readouterr().out
    assert numbers(lost) == numbers(finished_run.directory)
