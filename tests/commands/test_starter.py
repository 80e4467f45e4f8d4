"""`jaxrl init`: the config that it writes fits the file, and says what it is."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxrl_llm import cli
from jaxrl_llm.config import load_config
from jaxrl_llm.run.policy_parts import require_context

TEMPLATE = (
    "{% for m in messages %}<u>{{ m.role }}: {{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant: {% endif %}"
)


@pytest.fixture
def written(tmp_path, capsys):
    def make(lines, *words):
        data, out = tmp_path / "train.jsonl", tmp_path / "mine.yaml"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert cli.main(["init", str(data), "--out", str(out), "--model", str(tmp_path / "model"), *words]) == 0
        assert capsys.readouterr().out == f"wrote {out}; next: jaxrl explain {out}\n"
        return load_config(out), out.read_text()

    return make


@pytest.mark.parametrize(
    ("line", "format", "fields", "reward"),
    [
        ({"prompt": "What is 3 + 4?", "answer": "7", "hardness": 2}, "prompt", {}, "number_match"),
        ({"question": "3 + 4?", "answer": "It is so. #### 7"}, "gsm8k", {}, "number_match"),
        (
            {"problem": "Half?", "solution": "So \\boxed{\\sqrt{2}} it is."},
            "prompt",
            {"prompt": "problem", "answer": "solution", "answer_from": "boxed"},
            "latex_match",
        ),
        (
            {"instruction": "Name a colour.", "label": "red"},
            "prompt",
            {"prompt": "instruction", "answer": "label"},
            "exact_match",
        ),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "messages", {"answer": None}, "rewards_of_mine:graded"),
    ],
)
def test_format_fields_and_reward_fit_the_file(written, line, format, fields, reward):
    config, text = written([line] * 3)
    assert (config.data.format, config.data.fields) == (format, fields)
    assert reward in str(config.rewards)
    assert "{body}" in config.data.prompt_format
    if "hardness" in line:
        assert "your own function can read these columns as parameters: hardness" in text


@pytest.mark.parametrize(
    ("files", "prompts"), [(None, "chat"), ({}, "plain"), ({"chat_template": "{{ messages }}"}, "chat")]
)
def test_a_base_model_has_plain_prompts(tmp_path, written, files, prompts):
    if files is not None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(files))
    assert written([{"prompt": "3 + 4?", "answer": "7"}])[0].data.prompts == prompts


def test_the_longest_prompt_fits(written):
    config, _ = written([{"prompt": "x" * 900, "answer": "1"}])
    assert config.rollout.max_prompt_tokens == 384


@pytest.fixture
def model(tmp_path):
    """A model directory with a tokenizer of bytes and a chat template; the context is that of the test."""

    def make(context):
        directory = tmp_path / "model"
        directory.mkdir()
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=["<u>", "<e>"], initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([], trainer)
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"}))
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        (directory / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
        return directory

    return make


@pytest.mark.parametrize(
    ("context", "limits"), [(4096, (192, 512)), (256, (128, 128)), (160, (93, 67)), (90, (45, 45))]
)
def test_limits_count_format_and_template_and_fit_the_context(written, model, context, limits):
    directory = model(context)
    config, text = written([{"prompt": "What is 1+1?", "answer": "2"}, {"prompt": "1+1?", "answer": "2"}])
    assert "the longest is about 93 with prompt_format and the chat template, by the model's tokenizer" in text
    rollout = config.rollout
    assert (rollout.max_prompt_tokens, rollout.max_completion_tokens) == limits
    require_context(config, directory)
    assert (f"the room in the model's context of {context} tokens" in text) == (context < 4096)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": sum(limits) - 1}))
    with pytest.raises(ValueError, match=f"make sequences of {sum(limits)} tokens, more than the model's context of"):
        require_context(config, directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}', "has no column of prompts; it has the fields text, and one of prompt, problem"),
        ("[1, 2]", "has neither one JSON object per line"),
        ("nonsense", "has neither one JSON object per line"),
        ("", "has neither one JSON object per line"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path, capsys, content, message):
    data = tmp_path / "train.jsonl"
    data.write_text(content + "\n")
    assert cli.main(["init", str(data), "--out", str(tmp_path / "mine.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_config_is_not_written_over(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    out.write_text("name: mine\n")
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "answer": "1"}\n')
    assert cli.main(["init", str(data), "--out", str(out)]) == 2
    assert f"{out} exists already; give another file with --out" in capsys.readouterr().err
    assert out.read_text() == "name: mine\n"
