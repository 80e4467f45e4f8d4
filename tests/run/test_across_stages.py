"""A run of several tasks is measured on all of them after each, and a resumed one has the same matrix."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxrl_llm.config import parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.evaluation.comparison import continual
from jaxrl_llm.run.across_stages import across_summary
from jaxrl_llm.run.train import train
from jaxrl_llm.shipped import recipe_path


def test_a_matrix_that_is_not_whole_says_nothing_of_forgetting():
    rows = {"a": {"a": 0.5, "b": 0.1}}
    assert across_summary({}) == {}
    assert across_summary({"across_stages": rows}) == {"across_stages": {"accuracies": rows}}
    whole = {"a": {"a": 0.5, "b": 0.1}, "b": {"a": 0.25, "b": 0.75}}
    found = across_summary({"across_stages": whole})["across_stages"]
    assert found["forgetting"] == 0.25
    assert found["average"] == 0.5


@pytest.mark.slow
def test_packed_stages_are_measured_on_the_problems_of_all(tmp_path, data_directory):
    tree = read_tree(recipe_path("continual"))
    tree["task"] |= {"levels": [1, 2], "train_items": 32, "validation_items": 4, "test_items": 4}
    tree |= {"model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1}, "data": {"directory": data_directory}}
    tree["rollout"] |= {"max_prompt_tokens": 12, "max_completion_tokens": 24, "samples_per_prompt": 2}
    tree["training"] |= {"prompts_per_step": 2, "warmup_steps": 0, "packing": [0.5]}
    tree["evaluation"] |= {"problems": 4, "samples_per_problem": 2, "k": [1, 2], "sequences_per_batch": 8}
    tree["checkpoints"] = {"every_steps": 1, "keep": 2}
    tree["stages"][0] |= {"source": {"demonstrations": {"sequences_per_step": 4}}, "training": {"steps": 2}}
    tree["stages"][1] |= {"task": {"levels": [1]}, "training": {"steps": 2}}
    config = parse_config(tree, [f"run_dir={tmp_path / 'run'}"], vocabulary_size=CharacterTokenizer().vocabulary_size)
    summary = train(config, console=Console(file=io.StringIO()))
    found = summary["across_stages"]
    names = ["long chains", "short ones"]
    assert [*found["accuracies"]] == names
    matrix = [[found["accuracies"][after][task] for task in names] for after in names]
    assert np.isin(np.asarray(matrix) * 8, range(9)).all()
    assert {name: found[name] for name in continual(matrix)} == pytest.approx(continual(matrix))
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(written) == 4
    again = train(config, resume=True, console=Console(file=io.StringIO()))  # over already: nothing is done twice
    assert again["across_stages"]["accuracies"] == found["accuracies"]
    assert [json.loads(line)["loss"] for line in written] == [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
