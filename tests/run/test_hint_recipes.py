"""Recipes of several stages around what a prompt shows: hints, handbooks, logged moves; whole micro-runs."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxrl_llm.config import parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.run.train import train
from jaxrl_llm.shipped import recipe_path

pytestmark = pytest.mark.slow

ITEMS = {"train_items": 64, "validation_items": 4, "test_items": 4}
# Task, rollout, and steps of the stages.
SUMS = {"levels": [2], "options": {"scratchpad": False, "largest_number": 9}}
MICRO: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "agent_rlvr": (SUMS, {"max_prompt_tokens": 20}, (150, 3)),
    "compose": ({}, {"samples_per_prompt": 8, "max_completion_tokens": 48}, (250, 3)),
    "expo": (SUMS, {"max_prompt_tokens": 20, "samples_per_prompt": 5}, (150, 3)),
    "dsp": ({"levels": [2]}, {"max_prompt_tokens": 30}, (150, 3)),
    "metacognitive_reuse": ({"levels": [1]}, {"samples_per_prompt": 4, "max_completion_tokens": 30}, (150, 3)),
    "mobile_r1": ({"levels": [1, 2]}, {"samples_per_prompt": 4, "max_completion_tokens": 32}, (100, 3, 3)),
}


@pytest.fixture(scope="module", params=MICRO)
def run(request, data_directory, tmp_path_factory) -> tuple[str, dict[str, list[dict[str, float]]]]:
    """(name of the recipe, metrics of each step by stage)."""
    task, rollout, steps = MICRO[request.param]
    tree = read_tree(recipe_path(request.param))
    tree["data"] = tree.get("data", {}) | {"directory": data_directory}
    tree["task"] |= ITEMS | task
    tree["model"] = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    tree["rollout"] |= rollout
    tree["training"] |= {"prompts_per_step": 8, "warmup_steps": 0, "schedule": "constant", "minibatches_per_epoch": 1}
    tree["evaluation"] = {"problems": 4, "samples_per_problem": 2, "k": [1, 2], "sequences_per_batch": 8}
    if request.param == "compose":  # pairs of functions are beyond so small a model
        tree["stages"][1]["task"]["levels"] = [1]
    for stage, count in zip(tree["stages"], steps, strict=True):
        stage["training"] = {"steps": count, "learning_rate": 0.01 if count > 3 else 0.001}
        if "demonstrations" in stage.get("source", {}):
            stage["source"] = {"demonstrations": {"sequences_per_step": 32}}
    config = parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size)
    folder: Path = tmp_path_factory.mktemp(request.param) / "run"
    train(replace(config, run_dir=str(folder)), console=Console(file=io.StringIO()))
    by_stage: dict[str, list[dict[str, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        by_stage.setdefault((numbers := json.loads(line))["stage"], []).append(numbers)
    return request.param, by_stage


def test_demonstrations_are_learned_and_then_used(run):
    name, seen = run
    first, *later = seen.values()
    assert first[-1]["loss/negative_log_likelihood"] < 0.4 * first[0]["loss/negative_log_likelihood"]
    assert [len(stage) for stage in seen.values()] == list(MICRO[name][2])
    for stage in later:
        for step in stage:
            assert all(np.isfinite(value) for value in step.values() if isinstance(value, float))
    if name == "dsp":  # a frozen model answers twice; the hint writer is paid for both
        for step in later[0]:
            assert {"reward/first", "reward/second", "reward/keyword_rewards"} <= step.keys()
            assert step["gradient_norm"] > 0
        assert np.mean([step["reward/keyword_rewards"] for step in later[0]]) > 0
    if name == "agent_rlvr":  # pairs of a guided success and a plain failure, where there are any
        assert all({"margin/dpo", "loss/dpo"} <= step.keys() for step in later[0])
        assert max(step["gradient_norm"] for step in later[0]) > 0
    if name == "expo":  # explanations are learned from where no plain sample is right, too
        assert all(step["gradient_norm"] > 0 for step in later[0])
        assert np.mean([step["loss/stored_likelihood"] for step in later[0]]) > 0
    if name == "compose":
        assert 0 < np.mean([step["correct_share"] for step in later[0]]) < 1
        assert max(step["gradient_norm"] for step in later[0]) > 0
    if name == "mobile_r1":
        moves, episodes = later
        assert np.mean([step["reward/pattern_match"] for step in moves]) > 0.3
        assert np.mean([step["reward/turn_format_reward"] for step in episodes]) > 0
    if name == "metacognitive_reuse":
        assert np.mean([step["correct_share"] for step in later[0]]) > 0
