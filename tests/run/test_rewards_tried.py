"""Rewards before a run: called on two rows, with the columns of the user's file, and refused where these lack."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jaxrl_llm import cli
from jaxrl_llm.config import WarmStartConfig, parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.rewards_tried import require_answers, require_columns, require_usable_answers, try_readings
from jaxrl_llm.run.setup import parts
from jaxrl_llm.run.train import train


def graded(completions, hardness, length, answers=None):
    return [float(number) for number in hardness]


def telling(completions, hardness, length, answers=None):
    raise LookupError(f"got {completions} {hardness} {length.tolist()} {answers}")


def broken(completions, hardness):
    return [1.0 / (number - number) for number in hardness]


FAILED = []


def failing_once(completion):
    if not FAILED:
        FAILED.append(completion)
        raise TimeoutError("busy")
    return 1.0


def one_for_all(completions):
    return [1.0]


def worded(completions):
    return ["1.0" for _ in completions]


def of_a_column(hardness):
    return hardness


def by_answer(completions, answers):
    return [float(a in c) for c, a in zip(completions, answers, strict=True)]


@pytest.fixture
def made(micro_config, tmp_path, monkeypatch):
    """(parts, data sets) of a run on a file whose lines have a column of their own, with one reward."""
    monkeypatch.setitem(sys.modules, "own_rewards", SimpleNamespace(**globals()))

    def make(reward, line, **hyper):
        lines = [line | {"prompt": f"A:{i}+1"} for i in range(60)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        entry = {"python": f"own_rewards:{reward}", **hyper}
        tree = micro_config | {"task": None, "rewards": [entry], "data": {"path": str(tmp_path / "a.jsonl")}}
        tree |= {"warm_start": {}, "run_dir": str(tmp_path / "run")}
        built = parts(parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size))
        return built, data_sets(built.config)

    return make


@pytest.mark.slow
def test_a_reward_is_tried_on_the_first_row_with_its_columns(made):
    with pytest.raises(RewardError, match=r"got \['12', '12'\] \[3, 3\] \[2, 2\] \['12', '12'\]"):
        try_readings(*made("telling", {"hardness": 3, "answer": "12"}))
    built, sets = made("telling", {"hardness": 3})
    require_answers(built, sets)  # what is optional is not demanded
    with pytest.raises(RewardError, match=r"got \['', ''\] \[3, 3\] \[0, 0\] \['', ''\]"):
        try_readings(built, sets)
    try_readings(*made("graded", {"hardness": 3}))


def test_a_reward_that_fails_says_so_before_a_step(made):
    with pytest.raises(RewardError, match=r"reward 'broken' raised ZeroDivisionError: .* at row 0"):
        try_readings(*made("broken", {"hardness": 3}))


@pytest.mark.parametrize(
    "function", [broken, *(pytest.param(one, marks=pytest.mark.slow) for one in (one_for_all, worded))]
)
def test_a_reward_that_cannot_work_is_refused_whatever_its_value_on_failure(made, function):
    with pytest.raises(RewardError, match=f"'{function.__name__}' (raised|returned)"):
        try_readings(*made(function.__name__, {"hardness": 3}, value_on_failure=0.0))


def test_a_reward_with_a_value_on_failure_may_fail_on_one_row(made):
    with pytest.raises(RewardError, match="'failing_once' "):
        try_readings(*made("failing_once", {"hardness": 3}))
    FAILED.clear()
    assert try_readings(*made("failing_once", {"hardness": 3}, value_on_failure=0.0)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "reward, message",
    [
        ("one_for_all", "reward 'one_for_all' returned 1 values for 2 rows"),
        ("worded", "'worded' returned the text '1.0' at row 0; it must return one number"),
    ],
)
def test_values_that_are_no_rewards_are_refused_before_a_step(made, reward, message):
    with pytest.raises(RewardError, match=message):
        try_readings(*made(reward, {"hardness": 3}))


def test_a_view_that_names_no_text_is_refused_before_a_step(micro_config):
    view = {"filled_text": {"template": "{prompt}{thought}?", "says": "1"}}
    tree = micro_config | {"warm_start": {}, "views": {"asked": view}}
    reads = {f"{part}_{of}": f"asked_{of}" for part in ("yes", "no") for of in ("logprobs", "mask")}
    tree["credit"] = [{"rewards": {"verdict_score": {"reads": reads}}}, *tree["credit"]]
    built = parts(parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size))
    with pytest.raises(
        RewardError, match=r"'asked' raised ValueError: filled_text: template .* name {thought}, which is"
    ):
        try_readings(built, data_sets(built.config))


def test_an_answer_that_a_verifier_cannot_use_is_named_with_its_row(micro_config, tmp_path):
    lines = [{"prompt": f"A:{i}+1", "answer": str(i + 1) if i != 7 else "eight"} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    tree = micro_config | {"task": None, "rewards": ["number_match"], "data": {"path": str(tmp_path / "a.jsonl")}}
    tree |= {"warm_start": {}}
    built = parts(parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size))
    sets = data_sets(built.config)
    assert "eight" in [row["answer"] for row in sets["train"]]
    with pytest.raises(
        ValueError, match=r"reward 'number_match': the reference answer of line 8 of .*a.jsonl is 'eight', .* 1 of the"
    ):
        require_usable_answers(built, sets)


def test_a_column_that_some_rows_lack_is_named_with_the_row(made):
    built, sets = made("graded", {"hardness": 3})
    require_columns(built, sets)
    del sets["train"][4]["hardness"], sets["train"][4]["raw"]["hardness"]
    row = sets["train"][4]["item_id"] + 1
    with pytest.raises(
        ValueError, match=rf"'graded' reads the column 'hardness', which 1 of \d+ .* such as line {row} of "
    ):
        require_columns(built, sets)


def test_a_reward_of_a_column_alone_and_a_missing_file_are_explained(made, tmp_path):
    with pytest.raises(ValueError, match=r"'hardness', a column of the data, .* add a parameter such as `completions`"):
        made("of_a_column", {"hardness": 3})
    built, _ = made("graded", {"hardness": 3})
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data file .*a\.jsonl cannot be read: No such file or directory"):
        parts(built.config)


def test_a_column_and_answers_that_lack_are_named(made):
    with pytest.raises(ValueError, match="reward 'graded' names 'hardness', which nothing in this step provides"):
        made("graded", {"answer": "1"})
    with pytest.raises(ValueError, match=r"reward 'by_answer' reads the reference answer, but .*data\.fields\.answer"):
        require_answers(*made("by_answer", {"hardness": 3}))
    require_answers(*made("by_answer", {"answer": "1"}))


def test_bad_lines_speak_before_the_tables(micro_yaml, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "A:1+2", "answer": "3"}\n{"prompt": \n')
    changes = ["task=null", f"data.path={tmp_path / 'a.jsonl'}", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["train", str(micro_yaml), *changes]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("a.jsonl") == 1
    assert "a.jsonl has 1 line that cannot be used; repair it: line 2: not JSON" in err


@pytest.mark.slow
def test_a_run_on_prompts_alone_with_a_reward_of_a_column(made, tmp_path, monkeypatch, capsys):
    built, _ = made("graded", {"hardness": 3})
    summary = train(built.config)
    assert summary["before"] == {}
    assert summary["after"] == {}


def test_accuracy_that_is_never_measured_stops_nothing(made, tmp_path):
    built, _ = made("graded", {"hardness": 3})
    warm = WarmStartConfig(steps=1, sequences_per_step=1, probe_every_steps=1, stop_at_accuracy=0.5)
    with pytest.raises(ValueError, match=r"stop_at_accuracy is set, but the data has no reference answers"):
        train(replace(built.config, warm_start=warm))
    assert not (tmp_path / "run").exists()
