"""A run that starts from another one's policy: the same weights, merged, or under new adapters; with its optimiser."""

from __future__ import annotations

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.config import BranchConfig, load_config
from jaxrl_llm.run import checkpoints, train
from jaxrl_llm.run.restored import require_branch, restored_run
from jaxrl_llm.run.setup import parts

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def branch(finished_run):
    """Parts of a run that branches off the finished one, with changes to its config."""

    def make(*overrides, at=f"{finished_run.directory}@16"):
        return parts(load_config(finished_run.directory / "config.yaml", [f"init_from={at}", *overrides]))

    return make


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_starts_from_the_weights_of_the_checkpoint(branch, finished_run):
    built = branch("training.optimizer=sgd", "networks={}", "losses=[policy_gradient]")
    require_branch(built)
    source = restored_run(finished_run.directory / "checkpoints" / "16")[1].params
    assert_same(built.initial_params(KEY), source)
    newest = restored_run(finished_run.directory)[1].params
    assert_same(branch(at=str(finished_run.directory)).initial_params(KEY), newest)
    assert not np.array_equal(newest["embedding"], source["embedding"])


def test_weights_may_be_of_another_dtype_and_get_adapters(branch, finished_run):
    source = restored_run(finished_run.directory / "checkpoints" / "16")[1].params
    wide = branch("model.parameter_dtype=bfloat16")
    require_branch(wide)
    assert_same(wide.initial_params(KEY), jax.tree.map(lambda x: x.astype("bfloat16"), source))
    adapted = branch("lora={rank: 2, alpha: 4}")
    require_branch(adapted)
    made = adapted.initial_params(KEY)
    assert adapted.model.trained is not None
    assert_same(adapted.model.trained.reference(made), source)
    assert adapted.step.composition.networks["reference"].snapshot


@pytest.mark.slow
def test_adapters_of_the_other_run_go_on_or_are_merged(branch, finished_run, tmp_path):
    run = tmp_path / "adapted"
    over = ["lora={rank: 2, alpha: 4}", "warm_start.steps=0", "training.steps=1", "evaluation.every_steps=0"]
    config = str(finished_run.directory / "config.yaml")
    init = f"init_from={finished_run.directory}@16"
    assert cli.main(["train", config, init, *over, f"run_dir={run}"]) == 0
    source = restored_run(run)[1]
    go_on = branch("lora={rank: 2, alpha: 4}", at=str(run))
    require_branch(go_on)
    assert_same(go_on.initial_params(KEY), source.params)
    for built in (branch(at=str(run)), branch("lora={rank: 1, alpha: 1}", at=str(run))):
        require_branch(built)
        made, trained = built.initial_params(KEY), built.model.trained
        merged = source.model.trained.merged(source.params)
        assert_same(made if trained is None else trained.reference(made), merged)


def test_the_optimiser_may_be_taken_along(branch, finished_run):
    built = branch()
    state = built.step.init(KEY, built.initial_params(KEY), built.given())
    other = BranchConfig(str(finished_run.directory), 16, optimizer=True)
    taken = train._with_optimizer_of(other, state)
    counts = [int(x) for x in jax.tree.leaves(taken.networks["policy"].optimizer_state) if x.ndim == 0]
    assert set(counts) == {12}  # two updates in each of six steps
    assert_same(taken.params, state.params)
    plain = branch("training.optimizer=sgd")
    state = plain.step.init(KEY, plain.initial_params(KEY), plain.given())
    with pytest.raises(checkpoints.CheckpointError, match="has a surplus 'networks/policy/optimizer_state"):
        train._with_optimizer_of(other, state)


def test_another_shape_and_a_checkpoint_that_is_not_there_are_refused(branch, finished_run, capsys, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match=r"16 of init_from holds '.*' as float32.* but this config"):
        require_branch(branch("model.width=32"))
    with pytest.raises(checkpoints.CheckpointError, match=r"init_from names step 3 of .* of the steps 14, 16"):
        require_branch(branch(at=f"{finished_run.directory}@3"))
    config, run = str(finished_run.directory / "config.yaml"), tmp_path / "run"
    assert cli.main(["train", config, f"init_from={tmp_path}/none", f"run_dir={run}"]) == 2
    assert "none holds no checkpoint" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.slow
def test_a_run_goes_on_in_other_pieces_and_says_so(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run.directory, run)
    assert cli.main(["train", "--resume", str(run), "training.sequences_per_microbatch=8", "training.steps=9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "placement has changed: training.sequences_per_microbatch (4, now 8)" in said
    assert checkpoints.latest_step(run / "checkpoints") == 19
    assert replace(load_config(run / "config.yaml").training, steps=8).sequences_per_microbatch == 8
