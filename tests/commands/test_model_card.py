"""The model card of an export says what was trained, on what, how, and what was measured."""

from __future__ import annotations

import json

import yaml

from jaxrl_llm import __version__
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
    assert "| checkpoint | step 7 of 18, counted over all stages |" in card
    told = "10 steps on demonstrations (8 a step), then 8 steps of reinforcement, 4 prompts with 4 completions each."
    assert f"A model trained from a model described by its shape with jaxrl_llm {__version__}, on the built-in" in card
    assert f"task addition: {told}" in card
    assert "loss" not in card.split("| test problems")[1].split("```")[0]


def test_a_card_names_all_stages_and_how_adapters_are_loaded(micro_config, tmp_path):
    first = {"name": "sft", "source": {"distributions": {"file": "top.jsonl", "sequences_per_step": 4}}}
    first |= {"rewards": [], "credit": [], "losses": ["stored_likelihood"], "training": {"steps": 3}}
    tree = micro_config | {"model": {"path": "models/base"}, "lora": {"rank": 4, "alpha": 8}, "warm_start": {}}
    config = parse_config(tree | {"stages": [first, {"name": "rl", "training": {"steps": 1}}]})
    source = tmp_path / "run" / "checkpoints" / "4"
    merged, alone = (model_card(config, source, "out", adapters=one) for one in (False, True))
    assert "A model trained from `models/base` with" in merged
    stages = "3 steps on distributions (4 a step), then 1 step of reinforcement, 4 prompts with 4 completions each"
    assert f"on `top.jsonl`, the built-in task addition: {stages}; with LoRA of rank 4 (alpha 8), merged" in merged
    assert "| checkpoint | step 4 of 4, counted over all stages |" in alone
    head = yaml.safe_load(alone.split("---\n")[1])
    assert (head["library_name"], head["base_model"]) == ("peft", "models/base")
    assert "LoRA adapters trained from `models/base`" in alone
    assert "with LoRA of rank 4 (alpha 8)." in alone
    lines = alone.split("```python\n")[1].split("\n```")[0].splitlines()
    assert lines[-1] == 'tokenizer = AutoTokenizer.from_pretrained("models/base")'
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("models/base"), "out")' in lines[-2]
