"""docs/models.md runs as it stands, names every family, and its example learns a model of one's own."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxrl_llm.models import FAMILIES, TransformerConfig, config_from_json, save_model, transformer
from jaxrl_llm.models.families import VISION_LANGUAGE

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "models.md").read_text()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A tiny Qwen3 with tokenizer and chat template, in the working directory under the name that the page gives it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["What is 2+3?"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    config = TransformerConfig(vocabulary_size=tokenizer.get_vocab_size() + 5, width=16, layers=2, heads=2, kv_heads=1)
    directory = tmp_path / "Qwen3-0.6B"
    save_model(directory, transformer(config).init(jax.random.key(0)), config)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    return directory


@pytest.mark.slow
def test_the_pages_python_runs_as_it_stands(checkpoint, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 10
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "models.md", "exec"), scope)
    shown = capsys.readouterr().out
    assert "2 layers" in shown
    assert "nan" not in shown
    assert "(1,) (1, " in shown
    assert shown.splitlines()[-1] == "plain"
    # What was saved is what was trained.
    for leaf, other in zip(jax.tree.leaves(scope["params"]), jax.tree.leaves(scope["same"]), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in scope["files"]}


@pytest.fixture(scope="module")
def reference():
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DOCS))


def test_the_page_names_every_family(reference):
    assert reference.models_page() == PAGE, "the tables of docs/models.md are stale; run python docs/build.py"
    named = set(re.findall(r"`(\w+For(?:CausalLM|ConditionalGeneration))`", PAGE))
    assert named == {*FAMILIES, *VISION_LANGUAGE}
    assert all((DOCS / target).is_file() for target in re.findall(r"\]\(([\w/.]+)\)", PAGE))


def test_what_the_page_says_is_refused_is_refused(reference):
    sizes = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=4, num_attention_heads=32)
    for architecture, fields, _ in reference.REFUSED_MODELS:
        good = sizes | {"architectures": [architecture]}
        assert config_from_json(good).layers == 4
        (value,) = fields.values()
        shown = re.escape(str(next(iter(value.values())) if isinstance(value, dict) else value).strip("[]"))
        with pytest.raises(ValueError, match=rf"config\.json .*{shown}"):
            config_from_json(good | fields)


@pytest.mark.slow
def test_the_example_trains_a_module_of_ones_own(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("own_model", DOCS / "examples" / "own_model.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_model", example)  # where dataclasses look for it
    spec.loader.exec_module(example)
    before, after = example.main(warm_up_steps=6, steps=2, problems=8)
    shown = capsys.readouterr().out
    assert re.findall(r"step (\d+): reward 0\.\d{3}", shown) == ["0", "1"]
    assert re.search(r"pass@1: [\d.]+% -> [\d.]+%", shown)
    assert before["problems"] == after["problems"] == 8
    assert all(np.isfinite(value) for value in after.values())
