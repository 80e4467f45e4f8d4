"""The model card of an export says what was trained, on what, how, and what was measured."""

from __future__ import annotations

import json

import yaml

from jaxrl_llm.commands.model_card import model_card
from jaxrl_llm.config import parse_config


def test_a_card_says_where_a_model_comes_from_and_what_it_measured(micro_config, tmp_path):
    config = parse_config(micro_config, ["rewards=[{exact_answer: {weight: 2}}]"], vocabulary_size=100)
    source = tmp_path / "run" / "checkpoints" / "7"
    source.mkdir(parents=True)
    assert "The run has not ended" in model_card(config, source, "out")
    numbers = {"before": {"greedy": 0.25, "pass@1": 0.2, "loss": 3.0}, "after": {"greedy": 0.5, "pass@1": 0.455}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(numbers))
    card = model_card(config, source, "out")
    head, shown = card.split("---\n")[1], card.split("```yaml\n")[1].removesuffix("```\n")
    assert yaml.safe_load(head)["tags"] == ["reinforcement-learning", "jaxrl_llm"]
    assert parse_config(yaml.safe_load(shown), vocabulary_size=100) == config
    assert "| greedy | 25.0% | 50.0% |\n| pass@1 | 20.0% | 45.5% |" in card
    assert '`{"exact_answer": {"weight": 2}}`' in card
    assert "step 7" in card
    assert "loss" not in card.split("| test problems")[1].split("```")[0]
