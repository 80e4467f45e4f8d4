"""Parameters that never change are written once: restored, verified and kept as long as a checkpoint names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.config import parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import NetworkState, TrainState
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.run import checkpoints, integrity, stored_states, tidying
from jaxrl_llm.run.frozen import frozen_networks, written_once
from jaxrl_llm.run.setup import parts

REFERENCE = {"w": jnp.arange(3000.0).reshape(60, 50), "b": jnp.ones(7, jnp.bfloat16)}


def make_state(step: int, reference=REFERENCE) -> TrainState:
    policy = NetworkState({"w": jnp.full((40, 30), float(step))}, ({"count": jnp.int32(step)},))
    networks = {"policy": policy, "reference": NetworkState(reference)}
    return TrainState(networks=networks, memory={}, key=jax.random.key(7), step=jnp.int32(step))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A run of two stages with references of their own, of which the steps 4 and 8 share one."""
    run, done = tmp_path_factory.mktemp("written"), {}
    with checkpoints.checkpoint_manager(run / "checkpoints", keep=9) as manager:
        for step, stage, scale in ((4, "a", 1), (8, "a", 1), (12, "b", 2)):
            state = make_state(step, jax.tree.map(lambda x, by=scale: x * by, REFERENCE))
            apart = written_once(done, manager.directory, stage, state, ["reference"])
            checkpoints.save(manager, step, state, {"stage": stage, "stage_step": step}, frozen=apart)
    return run


@pytest.fixture
def run(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def same(found, wanted):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        raw = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (one, other)]
        np.testing.assert_array_equal(np.asarray(raw[0], np.float32), np.asarray(raw[1], np.float32))
        assert raw[0].dtype == raw[1].dtype


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_it_is_written_once_and_restored_with_every_checkpoint(run):
    folder = run / "checkpoints"
    assert len(list((run / "frozen").iterdir())) == 2
    assert "frozen" not in checkpoints.read_meta(folder, 8)
    for step, scale in ((4, 1), (8, 1), (12, 2)):
        wanted = make_state(step, jax.tree.map(lambda x, by=scale: x * by, REFERENCE))
        same(stored_states.restore(folder, step, jax.eval_shape(lambda: make_state(0))), wanted)
        same(
            stored_states.restore_params(folder, step, REFERENCE, network="reference"),
            wanted.networks["reference"].params,
        )
        found = integrity.verified(folder, step)
        assert (found.damage, found.recorded, found.arrays) == (None, True, 6)
    with pytest.raises(checkpoints.CheckpointError, match="networks/reference/params/w"):
        stored_states.restore(folder, 8, make_state(8, {"w": jnp.zeros(3), "b": REFERENCE["b"]}))


def test_damage_of_what_is_shared_is_named_and_the_policy_can_still_be_read(run):
    folder = run / "checkpoints"
    name = json.loads((folder / "8" / "meta" / "metadata").read_text())["frozen"]["reference"]
    (file,) = (path for path in (run / "frozen" / name).rglob("*") if path.is_file() and path.stat().st_size > 5000)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
    for step in (4, 8):
        assert "networks/reference/params/w" in str(integrity.verified(folder, step).damage)
    assert integrity.verified(folder, 12).damage is None
    assert integrity.verified(folder, 8, within="networks/policy/params/").damage is None
    shutil.rmtree(run / "frozen" / name)
    assert "parameters of reference, which it shares with others, are gone" in integrity.verified(folder, 8).damage
    with pytest.raises(checkpoints.Damaged):
        stored_states.restore(folder, 8, make_state(8))
    assert integrity.verified(folder, 8, within="networks/policy/params/").damage is None
    same(stored_states.restore_params(folder, 8, make_state(0).params), make_state(8).params)


def test_prune_keeps_what_a_kept_checkpoint_needs(run):
    folder = run / "checkpoints"
    assert tidying.prune(folder, keep=1, within=[4]) == [8]
    assert len(list((run / "frozen").iterdir())) == 2
    same(stored_states.restore(folder, 4, make_state(0)), make_state(4))
    (folder / "4" / "meta" / "metadata").write_text("{")  # nobody knows any more what it needs
    assert tidying.prune(folder, keep=2) == []
    assert len(list((run / "frozen").iterdir())) == 2
    assert tidying.prune(folder, keep=1) == [4]
    assert len(list((run / "frozen").iterdir())) == 1
    assert integrity.verified(folder, 12).damage is None


def test_a_converted_checkpoint_stands_alone(run, tmp_path):
    tidying.converted(run / "checkpoints", 8, tmp_path / "out")
    assert not (tmp_path / "out" / "frozen").exists()
    same(stored_states.restore(tmp_path / "out" / "checkpoints", 8, make_state(0)), make_state(8))
    tidying.converted(run / "checkpoints", 8, tmp_path / "one", network="reference")
    found = stored_states.restore_params(tmp_path / "one" / "checkpoints", 8, REFERENCE, network="reference")
    same(found, REFERENCE)


@pytest.mark.parametrize(("moved", "found"), [({}, ["reference"]), ({"copy_every": 3}, []), ({"decay": 0.9}, [])])
def test_what_follows_the_policy_is_not_frozen(micro_config, moved, found):
    config = parse_config(
        micro_config | {"networks": {"reference": moved}}, vocabulary_size=CharacterTokenizer().vocabulary_size
    )
    assert frozen_networks(parts(config).step.composition, ["policy", "reference"]) == found


@pytest.mark.slow
def test_a_run_goes_on_with_the_numbers_that_it_would_have_had(tmp_path, micro_config):
    tree = micro_config | {"networks": {}, "evaluation": {"problems": 4, "k": [1]}, "checkpoints": {"every_steps": 2}}
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(tree | {"warm_start": {"steps": 0}}))
    train = ["train", str(tmp_path / "micro.yaml")]
    assert cli.main([*train, f"run_dir={tmp_path / 'whole'}", "training.steps=6"]) == 0
    assert cli.main([*train, f"run_dir={tmp_path / 'cut'}", "training.steps=3"]) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "cut"), "training.steps=6"]) == 0
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in OF_MACHINE} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    assert len(list((tmp_path / "cut" / "frozen").iterdir())) == 1
