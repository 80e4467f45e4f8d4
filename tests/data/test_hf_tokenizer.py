"""Tokenizers of model directories agree with transformers, and say what is wrong with files that cannot be used."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxrl_llm.data import (
    encode_prompts,
    load_tokenizer,
    require_embedding,
    supervised_batches,
    with_chat,
    with_prompt_format,
)
from jaxrl_llm.data.extras import imported

TEXTS = [
    "How many clips did Natalia sell?",
    "  two  spaces\n\nand lines\t",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] 48 [/INST]</s>",
    "<start_of_turn>model\nfive<end_of_turn>",
    "naïve — 数学 🙂",
    "<think>\nfive\n</think>",
    "",
]
FAMILIES = ["qwen", "llama", "gemma", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_equal_those_of_transformers(directories, reference, family, text):
    directory = getattr(directories, family)()
    ours, theirs = load_tokenizer(directory), reference(directory)
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert [*ours.prefix_ids, *ids] == theirs(text)["input_ids"]
    silent = {*ours.eos_ids, ours.pad_id}
    assert ours.decode(ids) == theirs.decode([id for id in ids if id not in silent])
    assert ours.vocabulary_size == len(theirs)


@pytest.mark.parametrize(
    "family, eos, pad, prefix",
    [("qwen", (2, 0), 0, ()), ("llama", (4, 1), 4, (0,)), ("gemma", (1, 5), 0, (2,)), ("mistral", (2,), 2, (1,))],
)
def test_special_ids(directories, family, eos, pad, prefix):
    tokenizer = load_tokenizer(getattr(directories, family)())
    assert (tokenizer.eos_ids, tokenizer.eos_id) == (eos, eos[0])
    assert (tokenizer.pad_id, tokenizer.prefix_ids) == (pad, prefix)


def test_no_begin_of_sequence_where_the_tokenizer_has_none(directories):
    # Qwen's generation_config.json names a bos_token_id that its tokenizer never writes.
    tokenizer = load_tokenizer(directories.qwen())
    assert tokenizer.prompt_ids({"body": "48"}) == tokenizer.encode("48")


def test_padding_that_is_end_of_sequence_changes_no_length(directories):
    tokenizer = with_prompt_format(load_tokenizer(directories.llama()), "Q: {body}\nA:")
    assert tokenizer.pad_id == tokenizer.eos_id
    items = [
        {"body": "2+3", "answer": "5", "response": "It is 5."},
        {"body": "2+3+4+5", "answer": "14", "response": "14"},
    ]
    batch = supervised_batches(
        items, tokenizer, sequences_per_step=2, max_prompt_tokens=20, max_completion_tokens=9, seed=0
    )[0]
    for row, item in enumerate(batch.items):
        prompt = [*tokenizer.prefix_ids, *tokenizer.encode(f"Q: {item['body']}\nA:")]
        completion = [*tokenizer.encode(item["response"]), tokenizer.eos_id]
        assert batch.prompt_tokens[row].tolist() == [tokenizer.pad_id] * (20 - len(prompt)) + prompt
        assert batch.tokens[row].tolist() == completion + [tokenizer.pad_id] * (9 - len(completion))
        assert (batch.prompt_length[row], batch.length[row]) == (len(prompt), len(completion))


def test_end_of_sequence_and_padding_have_no_text_and_other_special_tokens_do(directories):
    tokenizer = load_tokenizer(directories.qwen())
    ids = [*tokenizer.encode("<|im_start|><think>5</think>"), *tokenizer.eos_ids, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "<|im_start|><think>5</think>"
    assert tokenizer.decode(np.asarray(ids)) == "<|im_start|><think>5</think>"


def test_ids_beyond_the_vocabulary_have_no_text(directories):
    tokenizer = load_tokenizer(directories.qwen())
    assert tokenizer.decode([*tokenizer.encode("5"), tokenizer.vocabulary_size + 7]) == "5"


def test_a_file_that_asks_for_cutting_and_padding_gets_neither(directories):
    backend = directories.byte_level(["<eos>"])
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = load_tokenizer(directories.save(directories.root, backend, {"eos_token": "<eos>"}))
    text = "Natalia sold clips to 48 of her friends in April"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 3 < len(tokenizer.encode(text)) < 64


def test_end_of_sequence_that_the_post_processor_appends_stands_in_no_prompt(directories):
    from tokenizers import processors

    backend = directories.byte_level(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    tokenizer = load_tokenizer(directories.save(directories.root, backend, {"eos_token": "<eos>"}))
    assert tokenizer.prompt_ids({"body": "48"}) == [0, *tokenizer.encode("48")]


def test_tokens_that_only_the_config_knows_are_added(directories, reference):
    size = directories.byte_level(["<eos>"]).get_vocab_size()
    entry = {"content": "<tool>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {"eos_token": "<eos>", "added_tokens_decoder": {str(size): entry | {"special": True}}}
    directory = directories.save(directories.root, directories.byte_level(["<eos>"]), config)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocabulary_size == size + 1
    assert tokenizer.encode("a<tool>b")[1] == size
    assert tokenizer.encode("a<tool>b") == reference(directory)("a<tool>b")["input_ids"]


def test_added_tokens_with_other_ids_in_the_two_files_are_refused(directories):
    config = {"added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": True}}}
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' the id 7, but with tokenizer.json it has the id 2"):
        load_tokenizer(directories.qwen(**config))


def test_special_tokens_from_the_older_map(directories):
    directory = directories.save(directories.root, directories.byte_level(["<bos>", "<eos>", "<pad>"]))
    entries = {"eos_token": {"content": "<eos>", "lstrip": False}, "pad_token": "<pad>", "bos_token": "<bos>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(entries))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((1,), 2)
    assert tokenizer.special_tokens == {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}


def test_end_of_sequence_from_the_model_config_where_nothing_else_names_one(directories):
    directory = directories.save(directories.root, directories.byte_level(["<eos>"]))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": -1}))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((0,), 0)


def test_fingerprint_follows_what_decides_the_ids(directories):
    first = load_tokenizer(directories.qwen()).fingerprint
    assert load_tokenizer(directories.qwen()).fingerprint == first
    assert load_tokenizer(directories.qwen(template="{{ messages[0].content }}")).fingerprint != first
    assert load_tokenizer(directories.llama()).fingerprint != first


def test_items_of_the_pipeline_become_prompts(directories):
    tokenizer = with_prompt_format(load_tokenizer(directories.gemma()), "{body} =")
    prompts = encode_prompts([{"body": "2+3", "answer": "5"}], tokenizer, max_prompt_tokens=12, max_answer_tokens=3)
    ids = [2, *tokenizer.encode("2+3 =")]
    assert prompts.tokens[0].tolist() == [tokenizer.pad_id] * (12 - len(ids)) + ids
    assert prompts.length[0] == len(ids)


def test_prompt_that_is_too_long_is_an_error_or_dropped(directories):
    tokenizer = load_tokenizer(directories.qwen())
    items = [{"body": "48", "answer": "1"}, {"body": "Natalia sold clips " * 9, "answer": "1"}]
    limits = {"max_prompt_tokens": 8, "max_answer_tokens": 2}
    with pytest.raises(ValueError, match=r"item 1 .* does not fit: its prompt has .* more than max_prompt_tokens=8"):
        encode_prompts(items, tokenizer, **limits)
    assert encode_prompts(items, tokenizer, **limits, overlong="drop").prompt_id.tolist() == [0]


def test_vocabulary_must_fit_the_embedding(directories):
    tokenizer = load_tokenizer(directories.qwen())
    size = tokenizer.vocabulary_size
    require_embedding(tokenizer, size)
    require_embedding(tokenizer, size + 64)
    with pytest.raises(
        ValueError, match=rf"ids up to {size - 1}, but .* {size - 1} rows, too few for 1 token: '</think>'"
    ):
        require_embedding(tokenizer, size - 1)


def test_a_directory_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file, message",
    [(None, "no tokenizer at all"), ("tokenizer.model", "only tokenizer.model, which is of the older kind")],
)
def test_no_tokenizer_json(tmp_path, file, message):
    if file:
        (tmp_path / file).write_bytes(b"\x0a")
    with pytest.raises(ValueError, match=f"no tokenizer.json .*{message}.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_that_is_cut_off(directories):
    directory = directories.qwen()
    file = directory / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    with pytest.raises(ValueError, match=r"tokenizer.json is not a file of the `tokenizers` library"):
        load_tokenizer(directory)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content, message", [("{", "cannot be read as JSON"), ("[1]", "has a list, not an object")])
def test_broken_settings_are_named(directories, name, content, message):
    directory = directories.qwen()
    (directory / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        load_tokenizer(directory)


def test_settings_that_name_tokens_that_are_not_there(directories):
    with pytest.raises(ValueError, match=r"pad_token is '\[PAD\]' .* no such token"):
        load_tokenizer(directories.qwen(pad_token="[PAD]"))
    directory = directories.qwen()
    for id in (99999, -1, "2", True):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, id]}))
        with pytest.raises(ValueError, match="no token has the id"):
            load_tokenizer(directory)


def test_no_end_of_sequence_at_all(directories):
    with pytest.raises(ValueError, match="defines an end of sequence"):
        load_tokenizer(directories.save(directories.root, directories.byte_level(["<eos>"])))


def test_chat_without_a_template(directories):
    with pytest.raises(ValueError, match="has no chat template"):
        with_chat(load_tokenizer(directories.mistral()))


def test_format_without_a_place(directories):
    tokenizer = load_tokenizer(directories.qwen())
    with pytest.raises(
        ValueError, match=r"has no place for the prompt; write \{body\} where .*, for example 'Q: \{body\}'"
    ):
        with_prompt_format(tokenizer, "Q: {question}")
    with pytest.raises(ValueError, match=r"for example 'Think first: \{body\}'"):
        with_prompt_format(tokenizer, "Think first: ")
    # Other braces stand for themselves.
    boxed = with_prompt_format(tokenizer, r"{body} Answer in \boxed{}.")
    assert boxed.decode(boxed.prompt_ids({"body": "2+3?"})) == r"2+3? Answer in \boxed{}."


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match=r"'no_such_package' .* pip install 'jaxrl_llm\[hf\]'"):
        imported("no_such_package.part")


@pytest.mark.parametrize("kind", ["qwen", "gemma"])
def test_the_bytes_of_tokens_spell_the_text(directories, kind):
    tokenizer = load_tokenizer(getattr(directories, kind)())
    pieces = tokenizer.token_bytes()
    assert len(pieces) == tokenizer.vocabulary_size
    text = "She sold 48 clips, é and 漢!"
    assert b"".join(pieces[id] or b"" for id in tokenizer.encode(text)).decode().strip() == text
    assert all(pieces[id] is None for id in tokenizer.eos_ids)
