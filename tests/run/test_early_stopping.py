"""A stage ends where its metric no longer becomes better, and at the same step where the run was resumed in between."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from jaxrl_llm import cli
from jaxrl_llm.config import StopWhenConfig, parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.run.early_stopping import reading

WARM = 10


@pytest.mark.parametrize(
    ("values", "rule", "decided"),
    [
        ([1, 2, 3, 4], {"patience": 1}, None),
        ([4, 3, 2, 1], {"patience": 3}, 4),
        ([4, 3, 2, 1], {"patience": 2, "best_is": "lowest"}, None),
        ([1, 1.05, 1.1, 1.15], {"patience": 2, "min_delta": 0.2}, 3),
        ([1, 1.05, 1.3, 1.3], {"patience": 2, "min_delta": 0.2}, None),  # a better one begins the count anew
        ([math.nan, 1, math.nan, math.nan], {"patience": 2}, 4),  # no number is better than a number, and none counts
    ],
)
def test_patience_counts_readings_without_a_better_one(values, rule, decided):
    held = {}
    for step, value in enumerate(values, 1):
        held = reading(held, StopWhenConfig("reward", **rule), step, value)
    assert held.get("decided") == decided


def lines(directory):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line.keys() - set(OF_MACHINE)} for line in found]


@pytest.mark.slow
def test_a_run_stops_early_and_does_so_when_it_is_resumed(micro_yaml, tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    # A constant rate is never better than at the first step: two readings later it is decided, at step 3.
    rule = "training.stop_when={metric: learning_rate, patience: 2}"
    kept = ["checkpoints.every_steps=1", "checkpoints.keep=9"]
    assert cli.main(["train", str(micro_yaml), f"run_dir={whole}", rule, *kept]) == 0
    assert "ends with the next step: learning_rate has not improved on 0.003, at" in capsys.readouterr().out
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["early_stopping"]["reinforcement"]["decided"] == 3
    assert len(lines(whole)) == WARM + 4
    for last in (2, 3, 4):  # before it is decided, behind, and at the end
        shutil.copytree(whole, resumed)
        for step in range(WARM + last + 1, WARM + 5):
            shutil.rmtree(resumed / "checkpoints" / str(step))
        assert cli.main(["train", "--resume", str(resumed)]) == 0
        assert lines(resumed) == lines(whole)
        shutil.rmtree(resumed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stop_when={metric: rewards}"], "stop_when.metric is 'rewards'; did you mean 'reward'"),
        (["training.stop_when={metric: validation/pass@1}", "evaluation.every_steps=0"], "set evaluation.every_steps"),
        pytest.param(
            ["training.stop_when={metric: validation/pass@3}"],
            "'validation/pass@3'; did you mean 'validation/pass@",
            marks=pytest.mark.slow,
        ),
        (["training.stop_when={metric: reward, patience: 0}"], "patience is 0"),
        (
            ["checkpoints.keep_best=1", "evaluation.every_steps=0"],
            "checkpoints.best_metric is .* evaluation.every_steps",
        ),
        pytest.param(
            ["checkpoints.keep_best=1", "checkpoints.best_metric=foo"],
            "checkpoints.best_metric is 'foo'; known",
            marks=pytest.mark.slow,
        ),
        (["training.stop_when={metric: reward, min_delta: -1}"], r"min_delta is -1"),
        (["training.stop_when={metric: reward, best_is: max}"], "'highest' or 'lowest'"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_computed(overrides, message, micro_config, tmp_path):
    from jaxrl_llm.run.train import train

    with pytest.raises(ValueError, match=message):
        train(
            parse_config(
                micro_config,
                [f"run_dir={tmp_path}/r", *overrides],
                vocabulary_size=CharacterTokenizer().vocabulary_size,
            )
        )
    assert not (tmp_path / "r").exists()
