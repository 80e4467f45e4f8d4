"""Runs of several stages: each goes on from the one before, and killing the run in any of them changes no number."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.experience import Loss
from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.reporting.run_directory import read_records
from jaxrl_llm.run import checkpoints

# The tests read checkpoints without the shardings that they were written with.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

MODEL = {"width": 8, "layers": 1, "heads": 1, "kv_heads": 1}
ROLLOUT = {"samples_per_prompt": 2, "max_prompt_tokens": 9, "max_completion_tokens": 6}
TRAINING = {"steps": 3, "prompts_per_step": 2, "learning_rate": 0.01}
EVALUATION = {"problems": 2, "samples_per_problem": 1, "k": [1], "sequences_per_batch": 4}


class Killed(BaseException):
    """The process ends here; nothing of the run is told."""


def train(*arguments: str, killed_after: int | None = None) -> SimpleNamespace:
    """`jaxrl train` in this process, which may end right after the metrics of a step were written."""
    write, out, err = RunDirectory.write_metrics, io.StringIO(), io.StringIO()

    def write_and_die(self, step, metrics):
        write(self, step, metrics)
        if step == killed_after:
            raise Killed

    status = None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(RunDirectory, "write_metrics", write_and_die)
        with contextlib.suppress(Killed):
            status = cli.main(["train", *map(str, arguments)])
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def metrics(directory):
    """Without what a clock says."""
    lines = read_records(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in OF_MACHINE} for line in lines]


def arrays(directory, step):
    """All arrays of a checkpoint by path."""
    with ocp.PyTreeCheckpointer() as reader:
        state = reader.restore(directory / "checkpoints" / str(step) / "state")
    state["key"] = jax.random.key_data(state["key"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def pairs(path, count=6):
    lines = [{"prompt": f"A:{n}+1", "chosen": str(n + 1), "rejected": str(n)} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def pairwise(judge_scores, preferred, group, weight):
    """A loss of Bradley and Terry on two rows a group."""
    sign = 2 * preferred - 1
    margin = jax.ops.segment_sum(sign * judge_scores, group, judge_scores.shape[0])
    there = jax.ops.segment_max(weight, group, judge_scores.shape[0]) > 0
    return Loss(jnp.where(there, jax.nn.softplus(-margin), 0.0).sum(), there.sum().astype(jnp.float32))


def judged(judge_scores):
    return judge_scores


def guided(guide_logprobs, mask):
    return (guide_logprobs * mask).sum(1)


def preferred_likelihood(logprobs, preferred, written_mask):
    chosen = written_mask * (preferred > 0)[:, None]
    return Loss(-(logprobs * chosen).sum(), chosen.sum())


@pytest.fixture(scope="module")
def my_methods():
    with pytest.MonkeyPatch.context() as patch:
        functions = {f.__name__: f for f in (pairwise, judged, guided, preferred_likelihood)}
        patch.setitem(sys.modules, "my_methods", SimpleNamespace(**functions))
        yield


@pytest.fixture(scope="module")
def config(data_directory, tmp_path_factory, my_methods):
    """A reward model from pairs, a stage that knows nothing of it, and reinforcement against it."""
    root = tmp_path_factory.mktemp("stages")
    sft = {
        "name": "sft",
        "source": {"demonstrations": {"sequences_per_step": 4}},
        "losses": ["negative_log_likelihood"],
    }
    model = {
        "name": "reward model",
        "source": {"pairs": {"file": pairs(root / "pairs.jsonl"), "groups_per_step": 2}},
        "losses": [
            {"python": "my_methods:pairwise"},
            {"preferred_likelihood": {"reads": {"logprobs": "guide_logprobs"}}},
        ],
        "networks": {"guide": {"learns": True, "learning_rate": 0.05}},
    }
    rl = {
        "name": "rl",
        "rewards": [{"python": "my_methods:judged"}, "exact_answer"],
        "credit": [
            {"advantages": {"running_mean_baseline": {"decay": 0.5}}},
            {"metric/guided": {"python": "my_methods:guided"}},
        ],
        "networks": {"guide": {"learns": False}},
        "losses": ["clipped_surrogate"],
        "data": {"selection": {"bandit": {"temperature": 0.5}}},
    }
    tree = {
        "name": "staged",
        "task": {"name": "addition", "levels": [1, 2], "options": {"scratchpad": False}}
        | {"train_items": 16, "validation_items": 2, "test_items": 2},
        "data": {"directory": data_directory},
        "model": MODEL,
        "rollout": ROLLOUT,
        "training": TRAINING,
        "networks": {"judge": {"head": "scalar", "learning_rate": 0.05}},
        "stages": [model, sft, rl],
        "evaluation": EVALUATION,
        "checkpoints": {"every_steps": 2, "keep": 20},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


@pytest.fixture(scope="module")
def whole(config):
    directory = config.parent / "whole"
    done = train(config, f"run_dir={directory}")
    assert done.status == 0, done.err
    return directory


def test_stages_follow_one_another(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["stage"] for line in lines] == ["reward model"] * 3 + ["sft"] * 3 + ["rl"] * 3
    assert "loss/pairwise" in lines[0]
    assert "loss/negative_log_likelihood" in lines[3]
    assert {"reward", "loss/clipped_surrogate"} <= lines[6].keys()
    assert lines[2]["loss"] != lines[0]["loss"]
    summary = json.loads((whole / "summary.json").read_text())
    assert {"before", "after"} <= summary.keys()
    assert {"train", "source of reward model"} <= summary["data"].keys()


def test_each_stage_goes_on_from_the_one_before(whole):
    states = {step: arrays(whole, step) for step in checkpoint_steps(whole)}
    # Where a stage never changes it, it lies beside the checkpoints, which name its digest.
    digests = {step: checkpoints.read_digests(whole / "checkpoints", step) or {} for step in (0, 3, 6, 9)}
    judge = [name for name in digests[9] if "judge" in name and "params" in name]
    guide = [name for name in digests[9] if "guide" in name and "params" in name]
    policy = [name for name in states[9] if "'policy'" in name and "'params'" in name]
    assert judge
    assert guide
    assert policy
    for name in judge + guide:  # learned in the first stage, carried through the second, and read by the third
        assert digests[3][name] == digests[6][name] == digests[9][name]
    for names in (judge, guide):
        assert any(digests[0][name] != digests[3][name] for name in names)
    for name in policy:  # which only the other stages move
        np.testing.assert_array_equal(states[0][name], states[3][name])
    assert all((states[3][name] != states[6][name]).any() for name in policy)
    assert any((states[6][name] != states[9][name]).any() for name in policy)


def test_the_selection_of_prompts_remembers(whole):
    first, last = (arrays(whole, step) for step in (6, 9))
    visits = next(name for name in last if "selection" in name and "visits" in name)
    assert first[visits].shape == (16,)
    assert (first[visits].sum(), last[visits].sum()) == (0, 6)


def checkpoint_steps(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def test_the_first_state_of_every_stage_is_saved(whole):
    assert checkpoint_steps(whole) == [0, 2, 3, 5, 6, 8, 9]


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_stage_gives_the_same_numbers(whole, config):
    directory = config.parent / "killed"
    assert train(config, f"run_dir={directory}", killed_after=3).status is None
    for step in (5, 7):
        assert train("--resume", directory, killed_after=step).status is None
    assert train("--resume", directory).status == 0
    assert metrics(directory) == metrics(whole)
    for step in (6, 9):
        expected, found = arrays(whole, step), arrays(directory, step)
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name], err_msg=name)
    before, after = (json.loads((one / "summary.json").read_text()) for one in (whole, directory))
    assert before["before"] == after["before"]
    assert before["after"] == after["after"]


def test_what_does_not_fit_speaks_before_the_stages_before(config):
    directory = config.parent / "never"
    said = train(config, f"run_dir={directory}", "rollout.max_completion_tokens=5")
    assert said.status == 2
    assert "does not fit: its completion has 6 tokens" in said.err
    assert not directory.exists()


def test_a_run_is_resumed_with_the_files_of_its_sources_only(whole, config):
    directory, file = config.parent / "copy", config.parent / "pairs.jsonl"
    shutil.copytree(whole, directory)
    content = file.read_text()
    try:
        pairs(file, count=5)
        said = train("--resume", directory)
    finally:
        file.write_text(content)
    assert said.status == 2
    assert "source of reward model changed since" in said.err


# ---- without problems -----------------------------------------------------------------------------------------------


@pytest.fixture
def without_problems(tmp_path, my_methods):
    tree = {
        "name": "pairs",
        "model": MODEL,
        "source": {"pairs": {"file": pairs(tmp_path / "pairs.jsonl"), "groups_per_step": 6}},
        "rollout": ROLLOUT,
        "training": TRAINING | {"steps": 2},
        "losses": [{"python": "my_methods:preferred_likelihood"}],
        "run_dir": str(tmp_path / "run"),
    }

    def write(**changes):
        (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(tree | changes))
        return tmp_path / "pairs.yaml"

    return write


@pytest.mark.slow
def test_a_file_of_pairs_is_enough(without_problems, tmp_path):
    done = train(without_problems())
    assert done.status == 0, done.err
    assert "sequences per step" in done.out
    assert "samples_per_prompt" not in done.out
    lines = metrics(tmp_path / "run")
    assert [line["stage"] for line in lines] == ["training"] * 2
    assert lines[1]["loss"] < lines[0]["loss"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] == summary["after"] == {}
    assert summary["data"].keys() == {"source of training"}
    assert train("--resume", tmp_path / "run", "training.steps=3").status == 0
    assert checkpoints.latest_step(tmp_path / "run" / "checkpoints") == 3
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert cli.main(["eval", str(tmp_path / "run")]) == 2
    assert "this config has no problems; name a built-in task" in err.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "sampler", "rewards": ["exact_answer"]},
        {"source": {"demonstrations": {"sequences_per_step": 2}}, "losses": ["negative_log_likelihood"]},
        {"warm_start": {"steps": 1}},
    ],
)
def test_what_needs_problems_says_so(without_problems, tmp_path, changes):
    done = train(without_problems(**changes))
    assert done.status == 2
    assert "task, data.path and data.sources are missing" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": TRAINING | {"minibatches_per_epoch": 4}},
            "does not divide the number of groups of written rows 6",
        ),
        ({"source": {"pairs": {"file": "nowhere.jsonl", "groups_per_step": 2}}}, "nowhere.jsonl cannot be read"),
        ({"rollout": ROLLOUT | {"max_completion_tokens": 1}}, "pairs.jsonl, line 1 needs 7 prompt and 2 completion"),
        ({"losses": ["clipped_surrogate"]}, "names 'advantages', which nothing in this step provides"),
        ({"losses": ["stored_likelihood", {"python": "my_methods:judged"}]}, "names 'judge_scores'"),
    ],
)
def test_what_cannot_work_is_said_before_the_run_is_made(without_problems, tmp_path, changes, message):
    done = train(without_problems(**changes))
    assert done.status == 2
    assert message in done.err
    assert not (tmp_path / "run").exists()
