"""The built-in tokenizer in the files of Hugging Face: the same ids, prompts and completions."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest
import transformers

from jaxrl_llm import cli
from jaxrl_llm.data import CharacterTokenizer, load_tokenizer, with_chat
from jaxrl_llm.data.character_files import save_character_tokenizer
from jaxrl_llm.data.tokenizer import CHARACTERS, CONTROLS
from jaxrl_llm.run.restored import restored_policy

OURS = CharacterTokenizer()
ITEM = {"body": "A:47+85"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    names = [path.name for path in save_character_tokenizer(made, OURS)]
    assert sorted(names) == sorted(path.name for path in made.iterdir())
    return made


def texts():
    rng = random.Random(0)
    drawn = ("".join(rng.choices([*CHARACTERS, *CONTROLS, "<", ">"], k=30)) for _ in range(100))
    return ["", "<t>1<2\n\n  b</t><a>132</a>", " <x> ", *drawn]


def test_every_text_has_the_same_ids_here_and_in_transformers(directory):
    read, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert (read.vocabulary_size, read.eos_ids, read.pad_id, read.prefix_ids) == (100, (2,), 0, (1,))
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    for text in texts():
        ids = OURS.encode(text)
        assert read.encode(text) == theirs(text, add_special_tokens=False).input_ids == ids
        shown = text.replace("<eos>", "").replace("<pad>", "")
        assert read.decode(ids) == shown
        assert theirs.decode(ids, skip_special_tokens=True) == shown.replace("<bos>", "")


def test_the_chat_template_makes_the_prompts_and_completions_of_a_run(directory):
    chatting, theirs = with_chat(load_tokenizer(directory)), transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": ITEM["body"]}]
    assert chatting.prompt_ids(ITEM) == theirs.apply_chat_template(messages, return_dict=False) == OURS.prompt_ids(ITEM)
    assert chatting.completion_ids(ITEM, "<a>132</a>") == OURS.completion_ids(ITEM, "<a>132</a>")


def test_a_character_without_a_token_is_refused(directory):
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot encode '4é7': WordLevel error"):
        load_tokenizer(directory).encode("4é7")


def test_an_exported_run_has_its_weights_and_prompts(finished_run, tmp_path):
    assert cli.main(["export", str(finished_run.directory), str(tmp_path / "out")]) == 0
    run, exported = restored_policy(finished_run.directory), restored_policy(tmp_path / "out", chat=True)
    jax.tree.map(np.testing.assert_array_equal, run.params, exported.params)
    assert exported.tokenizer.prompt_ids(ITEM) == run.tokenizer.prompt_ids(ITEM)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == (2, 0, 1)
    assert "AutoTokenizer.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
